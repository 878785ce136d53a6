# SPDX-License-Identifier: Apache-2.0
"""Typed clients, synchronous and asynchronous, of the LightLLM ensemble on Triton server.

They need tritonclient alone; lightllm_client.chat needs jinja2 too.
"""

from lightllm_client.async_client import AsyncChunkStream, AsyncLightLLMClient
from lightllm_client.errors import (
    Cancelled,
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    LightLLMError,
    NotFound,
    Unavailable,
)
from lightllm_client.options import Options
from lightllm_client.sync_client import ChunkStream, LightLLMClient
from lightllm_client.tensors import Chunk, Generation, PromptLogProbs

__version__ = "0.2.0"

__all__ = [
    "AsyncChunkStream",
    "AsyncLightLLMClient",
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
    "PromptLogProbs",
    "Unavailable",
]
