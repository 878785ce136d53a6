# SPDX-License-Identifier: Apache-2.0
"""GET /v1/models and /v1/models/NAME: the one model that is served."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, Request

from lightllm_backend.front.errors import ApiError
from lightllm_backend.front.state import Front, front_of
from lightllm_backend.options import show

router = APIRouter(prefix="/v1", tags=["OpenAI"])


@router.get("/models")
async def list_models(request: Request) -> dict[str, Any]:
    """List the models: the one that this server has."""
    return {"object": "list", "data": [await _model(front_of(request))]}


@router.get("/models/{name:path}")
async def get_model(request: Request, name: str) -> dict[str, Any]:
    """Describe the model of this name."""
    front = front_of(request)
    check_model(front, name)
    return await _model(front)


def check_model(front: Front, name: str | None) -> None:
    """Raise ApiError 404 for a model that the server has not; None is its own."""
    if name is not None and name != front.model_name:
        message = f"model is {show(name)}; allowed: {show(front.model_name)}"
        raise ApiError(HTTPStatus.NOT_FOUND, message, "model", "model_not_found")


async def _model(front: Front) -> dict[str, Any]:
    # The KV pool may hold less than the settings and config.json allow, which the engine knows once it is up.
    longest = await front.engine_load.longest()
    return {
        "id": front.model_name,
        "object": "model",
        "created": front.created,
        "owned_by": "lightllm",
        "root": front.model_name,
        "parent": None,
        "max_model_len": longest or front.lengths.max_total,
    }
