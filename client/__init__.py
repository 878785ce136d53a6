# SPDX-License-Identifier: Apache-2.0
"""A typed client of the LightLLM ensemble on Triton server, on tritonclient alone; client.chat needs jinja2 too."""

from client.errors import (
    Cancelled,
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    LightLLMError,
    NotFound,
    Unavailable,
)
from client.lightllm import ChunkStream, LightLLMClient
from client.tensors import Chunk, Generation, Options

__all__ = [
    "Cancelled",
    "Chunk",
    "ChunkStream",
    "DeadlineExceeded",
    "Generation",
    "Internal",
    "InvalidArgument",
    "LightLLMClient",
    "LightLLMError",
    "NotFound",
    "Options",
    "Unavailable",
]
