# SPDX-License-Identifier: Apache-2.0
"""The front's OpenAPI document: FastAPI's, with what FastAPI cannot know."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from lightllm_backend.front.errors import ERROR_RESPONSES

_EVENTS = {"schema": {"type": "string", "description": "Server-sent events, if the request asks for a stream."}}
_WITHOUT_BODY = (401, 404, 500)  # errors that a request without a body can get


def described(application: FastAPI) -> dict[str, Any]:
    """Return the document, which is made once."""
    if application.openapi_schema is None:
        document = get_openapi(title=application.title, version=application.version, routes=application.routes)
        for path, operations in document["paths"].items():
            for operation in operations.values():
                _complete(operation, path.startswith("/v1/"))
        application.openapi_schema = document
    return application.openapi_schema


def _complete(operation: dict[str, Any], may_stream: bool) -> None:
    responses = operation["responses"]
    responses.pop("422", None)  # FastAPI's own; here a body that is refused gets 400
    if "requestBody" in operation:
        if may_stream:
            responses["200"].setdefault("content", {})["text/event-stream"] = _EVENTS
        return
    for status in _WITHOUT_BODY:
        responses.setdefault(str(status), ERROR_RESPONSES[status])
