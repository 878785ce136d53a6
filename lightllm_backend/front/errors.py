# SPDX-License-Identifier: Apache-2.0
"""The front's errors: ApiError, its form in OpenAI's API, and what it is made from.

OpenAI's form is `{"error": {"message", "type", "param", "code"}}`. A refusal names the field, the value and what is
allowed. A request that fails once its answer has begun gets the same object as an event of the stream.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from lightllm_backend.options import show
from lightllm_client import (
    Cancelled,
    DeadlineExceeded,
    InvalidArgument,
    LightLLMError,
    NotFound,
    Unavailable,
)

log = logging.getLogger("lightllm.front")

RETRY_SECONDS = 1  # after which a client may ask again

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
# The engine's names of options, where those of OpenAI's API are others.
_FIELD_NAMES = {
    "text_input": "prompt",
    "input_ids": "prompt",
    "stop_words": "stop",
    "stop_token_ids (or end_id)": "stop_token_ids",
    "the prompt": "prompt",
}
_SHOWN_PLACE = 200  # characters of a field's place in the body
# What gRPC says, with an address that no client of the front can reach.
_NO_CONNECTION = "failed to connect to all addresses"
_BEGINNING = re.compile(r"(the prompt|\w+(?: \(or \w+\))?) (?:is|has|holds|cannot|allows) ")
# What pydantic says is allowed, in the words of JSON.
_WORDS = {
    r"^Input should be (an? instance of )?": "",
    r"^(List|String) should have (at \w+ \d+ \w+).*": r"\2",
    r"^a valid boolean": "true or false",
    r"^a valid dictionary": "a JSON object",
    r"^a valid integer": "a whole number",
    r"^a valid ": "a ",
}

_ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
# What the OpenAPI document says of the errors of a request that has a body.
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {
        "description": HTTPStatus(status).phrase,
        "content": {"application/json": {"schema": _ERROR_SCHEMA}},
    }
    for status in (400, 401, 404, 413, 429, 500, 503, 504)
}


class ApiError(Exception):
    """An error that ends one request. param: the field of the body that is wrong, if it is one."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})
        if status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
            self.headers.setdefault("retry-after", str(RETRY_SECONDS))

    def body(self) -> bytes:
        """The error in OpenAI's form, as JSON."""
        default = "invalid_request_error" if self.status < 500 else "server_error"
        error = {
            "message": self.message,
            "type": _TYPES.get(self.status, default),
            "param": self.param,
            "code": self.code,
        }
        return json.dumps({"error": error}).encode()

    def response(self) -> Response:
        return Response(self.body(), self.status, self.headers, "application/json")


def _shown(value: Any) -> str:
    try:
        return show(value)
    except (RecursionError, ValueError):
        return "too deeply nested"


def refusal(field: str, value: Any, allowed: str, reason: str = "") -> ApiError:
    """The error 400 for a field of the body with a value that is not allowed. reason: goes on after the value."""
    return ApiError(HTTPStatus.BAD_REQUEST, f"{field} is {_shown(value)}{reason}; allowed: {allowed}", field)


def from_engine(error: LightLLMError, constrained_by: str = "") -> ApiError:
    """The error of a request that the engine has refused, or could not finish.

    constrained_by: the field that became the engine's structured_output.
    """
    message = error.message
    if isinstance(error, InvalidArgument):
        named = _BEGINNING.match(message)
        names = {**_FIELD_NAMES, "structured_output": constrained_by or "structured_output"}
        param = names.get(named[1], named[1]) if named else None
        if named and param and named[1] != "the prompt":
            message = param + message[named.end(1) :]
        is_too_long = "prompt tokens (" in message or "in all (" in message
        return ApiError(400, message, param, "context_length_exceeded" if is_too_long else None)
    if isinstance(error, NotFound):
        return ApiError(404, message, code="model_not_found")
    if isinstance(error, Unavailable):
        if _NO_CONNECTION in message:
            message = "the server does not answer: it is starting, or has stopped; try again"
        is_full = "the queue is full" in message
        return ApiError(429 if is_full else 503, message, code="rate_limit_exceeded" if is_full else "unavailable")
    if isinstance(error, (Cancelled, DeadlineExceeded)):
        return ApiError(504, message, code="deadline_exceeded")
    log.error("the engine has failed at a request: %s", error)
    return ApiError(500, message, code="engine_error")


def _place(loc: Sequence[str | int], body: Any, is_missing: bool) -> list[str]:
    """Return the keys that lead to a value of the body; pydantic's own names of kinds of values are not among them."""
    place = []
    for part in loc:
        if (isinstance(body, dict) and part in body) or (isinstance(body, list) and isinstance(part, int)):
            body = body[part]  # type: ignore[index]
            place.append(str(part))
    return [*place, str(loc[-1])] if is_missing and loc else place


def _named(field: str) -> str:
    return field if field.isprintable() and field else show(field)


def nested_too_deeply(field: str, levels: int) -> ApiError:
    """The error for a field of the body in which more objects and lists are nested than so many."""
    field = field[:_SHOWN_PLACE]
    return ApiError(400, f"{_named(field)} is nested more than {levels} levels deep; allowed: at most {levels}", field)


def from_validation(errors: Sequence[Mapping[str, Any]], body: Any) -> ApiError:
    """The error for a body that pydantic has refused; of several errors it has the first."""
    first = errors[0]
    place = _place(first["loc"][1:], body, is_missing=first["type"] == "missing")
    param = ".".join(place)[:_SHOWN_PLACE] if place else None
    field = "the body" if param is None else _named(param)
    kind, message = first["type"], str(first["msg"])
    if kind == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first['ctx']['error']}; allowed: a JSON object")
    if kind == "missing" and param is None:
        return ApiError(400, "the body is missing; allowed: a JSON object")
    if kind == "missing":
        return ApiError(400, f"{field} is missing; allowed: a value that /openapi.json describes", param)
    if kind == "extra_forbidden":
        return ApiError(400, f"{field} is not a field of this request; allowed: those that /openapi.json lists", param)
    if kind == "model_attributes_type" and isinstance(body, bytes):
        return ApiError(400, "the header Content-Type names no JSON; allowed: application/json")
    if kind == "model_attributes_type":
        return ApiError(400, f"{field} is {_shown(first.get('input'))}; allowed: a JSON object", param)
    allowed = message
    for pattern, words in _WORDS.items():
        allowed = re.sub(pattern, words, allowed)
    return ApiError(400, f"{field} is {_shown(first.get('input'))}; allowed: {allowed}", param)


def install(application: FastAPI) -> None:
    """Answer every error of a handler, and of the routing, in OpenAI's form."""

    async def on_api_error(_request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error.response()

    async def on_engine_error(_request: Request, error: Exception) -> Response:
        assert isinstance(error, LightLLMError)
        return from_engine(error).response()

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = str(error.detail)
        if error.status_code in (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED):
            methods = (error.headers or {}).get("Allow")
            message = f"{request.method} {show(request.url.path)}: {message}" + (
                f"; allowed: {methods}" if methods else ""
            )
        return ApiError(error.status_code, message, headers=error.headers).response()

    async def on_validation_error(_request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return from_validation(error.errors(), error.body).response()

    async def on_bug(_request: Request, _error: Exception) -> Response:
        return ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, "the front has failed at this request").response()

    application.add_exception_handler(ApiError, on_api_error)
    application.add_exception_handler(LightLLMError, on_engine_error)
    application.add_exception_handler(HTTPException, on_http_error)
    application.add_exception_handler(RequestValidationError, on_validation_error)
    application.add_exception_handler(Exception, on_bug)
