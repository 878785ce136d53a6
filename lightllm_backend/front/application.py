# SPDX-License-Identifier: Apache-2.0
"""Builds the front's ASGI application: its routers, middleware and errors."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from lightllm_backend.front import errors, metrics
from lightllm_backend.front.description import described
from lightllm_backend.front.json_route import json_routes
from lightllm_backend.front.lightllm import router as lightllm
from lightllm_backend.front.openai import chat, completions, models
from lightllm_backend.front.page.router import page_router
from lightllm_backend.front.security import Guard
from lightllm_backend.front.state import Front
from lightllm_backend.version import VERSION


def make_application(front: Front, api_keys: Iterable[str] = ()) -> FastAPI:
    """Make the application. Handlers find `front` by `front_of(request)`."""

    @asynccontextmanager
    async def lifespan(_application: FastAPI) -> AsyncIterator[None]:
        async with front.client:
            yield

    # Without pages that load scripts from elsewhere; /openapi.json describes the requests.
    application = FastAPI(
        title="LightLLM on Triton server",
        version=VERSION,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        redirect_slashes=False,
    )
    application.state.front = front
    application.openapi = lambda: described(application)  # type: ignore[method-assign]
    for router in (models.router, completions.router, chat.router, lightllm.router, metrics.router, page_router(front)):
        application.include_router(router)
    # Before FastAPI's own routes of the same paths.
    application.router.routes[:0] = [*json_routes(completions.router), *json_routes(chat.router)]
    errors.install(application)
    # The last one added comes first.
    application.add_middleware(Guard, api_keys=tuple(api_keys), max_body_bytes=front.config.max_body_bytes)
    if front.config.cors_origins:
        application.add_middleware(
            CORSMiddleware,
            allow_origins=front.config.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-request-id"],
            expose_headers=["x-request-id", "retry-after"],
        )
    return application
