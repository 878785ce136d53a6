# SPDX-License-Identifier: Apache-2.0
"""Routes of POST requests with a JSON body that pass FastAPI by: they cost half of what its routes do. Pure ASGI.

FastAPI matches its own routes twice and solves dependencies that we do not have, which takes as long as all else that
the front does before the engine gets a request. It goes on to describe these routes.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from email.message import Message
from http import HTTPStatus
from typing import Any, get_type_hints

from fastapi import APIRouter
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from lightllm_backend.client_json import is_deeper
from lightllm_backend.front.answers import read_body
from lightllm_backend.front.errors import ApiError, from_validation, nested_too_deeply
from lightllm_backend.structured_output import MAX_SCHEMA_DEPTH

MAX_FIELD_DEPTH = MAX_SCHEMA_DEPTH + 3  # levels; a schema in `tools` has three around it

Handler = Callable[[Request, Any], Awaitable[Response]]


def json_routes(router: APIRouter) -> list[Route]:
    """Return routes to the handlers of a router whose arguments are `request` and a pydantic model, `body`."""
    return [
        Route(route.path, _Endpoint(route.endpoint), methods=route.methods)
        for route in router.routes
        if isinstance(route, APIRoute)
    ]


class _Endpoint:
    """Reads and checks the body, and calls the handler with it; its errors are those of FastAPI's routes."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._model: type[BaseModel] = get_type_hints(handler)["body"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive, send)
        response = await self._handler(request, self._checked(request, await read_body(request)))
        await response(scope, receive, send)

    def _checked(self, request: Request, data: bytes) -> BaseModel:
        """Return the model of a body; raise ApiError 400."""
        value: Any = data
        if data and _is_json(request.headers.get("content-type", "")):
            try:
                value = json.loads(data)
            except json.JSONDecodeError as error:
                wrong = {"type": "json_invalid", "loc": ("body",), "msg": "", "ctx": {"error": error.msg}}
                raise from_validation([wrong], data) from None
            except RecursionError:
                told = f"the body is nested too deeply; allowed: at most {MAX_FIELD_DEPTH} levels in a field"
                raise ApiError(HTTPStatus.BAD_REQUEST, told) from None
            except UnicodeDecodeError:
                raise ApiError(HTTPStatus.BAD_REQUEST, "the body is not UTF-8; allowed: a JSON object") from None
            except ValueError:  # Python's own limit
                told = "the body holds an integer of thousands of digits; allowed: integers of 64 bits"
                raise ApiError(HTTPStatus.BAD_REQUEST, told) from None
            _check_depth(data, value)
        if not data:
            raise from_validation([{"type": "missing", "loc": ("body",), "msg": ""}], value)
        try:
            return self._model.model_validate(value, from_attributes=True)
        except ValidationError as error:
            wrongs = error.errors(include_url=False)
            raise from_validation([{**wrong, "loc": ("body", *wrong["loc"])} for wrong in wrongs], value) from None


def _check_depth(data: bytes, value: Any) -> None:
    """Raise ApiError 400 for a field that is nested deeper than the engine or pydantic can read."""
    if data.count(b"{") + data.count(b"[") <= MAX_FIELD_DEPTH or not isinstance(value, dict):
        return
    for name, field in value.items():
        if is_deeper(field, MAX_FIELD_DEPTH):
            raise nested_too_deeply(name, MAX_FIELD_DEPTH)


def _is_json(content_type: str) -> bool:
    if content_type == "application/json":  # of nearly all
        return True
    header = Message()
    header["content-type"] = content_type
    subtype = header.get_content_subtype()
    return header.get_content_maintype() == "application" and (subtype == "json" or subtype.endswith("+json"))
