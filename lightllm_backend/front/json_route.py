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
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from lightllm_backend.front.answers import read_body
from lightllm_backend.front.errors import from_validation

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
        """Return the model of a body; raise ApiError 400, or HTTPException 400 for what is hardly text."""
        value: Any = data
        if data and _is_json(request.headers.get("content-type", "")):
            try:
                value = json.loads(data)
            except json.JSONDecodeError as error:
                wrong = {"type": "json_invalid", "loc": ("body",), "msg": "", "ctx": {"error": error.msg}}
                raise from_validation([wrong], data) from None
            except (RecursionError, ValueError):
                raise HTTPException(HTTPStatus.BAD_REQUEST) from None
        if not data:
            raise from_validation([{"type": "missing", "loc": ("body",), "msg": ""}], value)
        try:
            return self._model.model_validate(value, from_attributes=True)
        except ValidationError as error:
            wrongs = error.errors(include_url=False)
            raise from_validation([{**wrong, "loc": ("body", *wrong["loc"])} for wrong in wrongs], value) from None


def _is_json(content_type: str) -> bool:
    if content_type == "application/json":  # of nearly all
        return True
    header = Message()
    header["content-type"] = content_type
    subtype = header.get_content_subtype()
    return header.get_content_maintype() == "application" and (subtype == "json" or subtype.endswith("+json"))
