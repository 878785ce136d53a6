# SPDX-License-Identifier: Apache-2.0
"""GET /metrics: Triton server's metrics, for those who scrape a server at the port that serves its API."""

from __future__ import annotations

from http import HTTPStatus

from fastapi import APIRouter, Request
from starlette.responses import Response

from lightllm_backend.front.errors import ERROR_RESPONSES, ApiError
from lightllm_backend.front.state import front_of

MAX_AGE_S = 0.1  # the engine tells its load as often
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

router = APIRouter(tags=["Operation"])


@router.get("/metrics", response_class=Response, responses=ERROR_RESPONSES)
async def metrics(request: Request) -> Response:
    """Return the metrics of Triton server and of the engine, in Prometheus' text format."""
    text = await front_of(request).engine_load.text(MAX_AGE_S)
    if not text:
        raise ApiError(HTTPStatus.SERVICE_UNAVAILABLE, "the server's metrics endpoint does not answer")
    return Response(text, media_type=CONTENT_TYPE)
