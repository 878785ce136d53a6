# SPDX-License-Identifier: Apache-2.0
"""Routes of the page: its files, and the engine's load that it draws. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.staticfiles import StaticFiles

from lightllm_backend.front.state import Front

STATIC = Path(__file__).parent / "static"
# Everything comes from this server, and no script or style is inside a document. So a model's answer that reached the
# document as HTML could neither run nor send anything.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",  # browsers ask each time, and get a 304 unless the file has changed
}


def page_router(front: Front) -> APIRouter:
    """Make the router of the page: `/`, its files below `/page/`, and `/status`, which asks for an API key."""
    router = APIRouter(include_in_schema=False)
    files = StaticFiles(directory=STATIC)

    async def file(name: str, request: Request) -> Response:
        response = await files.get_response(name, request.scope)
        response.headers.update(HEADERS)
        return response

    @router.api_route("/", methods=["GET", "HEAD"])
    async def index(request: Request) -> Response:
        return await file("index.html", request)

    @router.get("/status")
    async def status() -> dict[str, Any]:
        return {"chat": front.chat_template is not None, **await front.engine_load.read()}

    @router.api_route("/page/{name:path}", methods=["GET", "HEAD"])
    async def static_file(name: str, request: Request) -> Response:
        return await file(name, request)

    return router
