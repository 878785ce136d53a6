# SPDX-License-Identifier: Apache-2.0
"""Reads the requests that Triton server hands to the models. No torch."""

from __future__ import annotations

import json
import os
import time
from typing import Any

from lightllm_backend.config import PROBE_KEY_VARIABLE
from lightllm_backend.messages.ensemble_messages import ChunkDetails, EnsembleContext
from lightllm_backend.option_table import integer
from lightllm_backend.options import ParsedRequest, parse_request
from lightllm_backend.request import FinishReason, RequestError, TokenChunk
from lightllm_backend.triton_server.tensors import (
    CHUNK,
    ENSEMBLE,
    GENERATION_INPUTS,
    GENERATION_OUTPUTS,
    PUBLIC_INPUTS,
    SAMPLING_PARAMETERS,
)

_SIZES = {
    name: size
    for tensors in (PUBLIC_INPUTS, GENERATION_INPUTS, GENERATION_OUTPUTS)
    for name, (_, size) in tensors.items()
}


def read_request(request: Any) -> ParsedRequest:
    """A client's request, from all its sources. Raises RequestError INVALID_ARG if it cannot be read."""
    inputs = _inputs(request)
    return parse_request(inputs, inputs.pop(SAMPLING_PARAMETERS, None), _parameters(request))


def read_deadline(request: Any) -> float | None:
    """The request's deadline in time.monotonic() seconds: its `timeout`, in microseconds, from now. None: no deadline.

    The generate endpoints have no field for a timeout; their requests carry it as a parameter.
    """
    timeout = request.timeout() or _parameters(request).get("timeout", 0)
    try:
        seconds = integer(timeout) / 1e6
    except ValueError:
        seconds = -1.0
    if seconds < 0:
        raise RequestError("INVALID_ARG", f"timeout is {timeout!r}; allowed: an integer ≥ 0, of microseconds")
    return time.monotonic() + seconds if seconds else None


def is_probe(request: Any) -> bool:
    """Whether this is the launch command's probe, which knows the key with which it started the server."""
    key = os.environ.get(PROBE_KEY_VARIABLE, "")
    return bool(key) and "probe_key" in request.parameters() and _parameters(request).get("probe_key") == key


def read_generation_request(request: Any) -> tuple[ParsedRequest, EnsembleContext | None]:
    """A request to generation and, if the tokenizer step sent it, the context that came along."""
    inputs = _inputs(request)
    context = inputs.pop(ENSEMBLE, None)
    # In the ensemble the tokenizer step has already read the request's parameters.
    parameters = {} if context else _parameters(request)
    parsed = parse_request(inputs, inputs.pop(SAMPLING_PARAMETERS, None), parameters)
    return parsed, EnsembleContext.from_json(context) if context else None


def read_chunk(request: Any) -> tuple[TokenChunk | None, ChunkDetails]:
    """A chunk, and the details that came along. A probe has no chunk."""
    inputs = _inputs(request)
    details = ChunkDetails.from_json(inputs[CHUNK])
    if details.probe:
        return None, details
    chunk = TokenChunk(
        uid=details.uid,
        token_ids=inputs["output_ids"],
        log_probs=inputs["output_log_probs"],
        finish_reason=FinishReason(details.finish_reason) if details.finish_reason else None,
        num_prompt_tokens=details.num_input_tokens,
        error=RequestError.parse(details.error) if details.error else None,
    )
    return chunk, details


def _inputs(request: Any) -> dict[str, Any]:
    """The values of the request's tensors, by name."""
    return {tensor.name(): _value(tensor) for tensor in request.inputs()}


def _value(tensor: Any) -> Any:
    """A tensor as a plain value: an item if its size is 1, else a list."""
    name = tensor.name()
    items = tensor.as_numpy().reshape(-1).tolist()
    try:
        items = [item.decode() if isinstance(item, bytes) else item for item in items]
    except UnicodeDecodeError as error:
        raise RequestError("INVALID_ARG", f"{name} is not UTF-8 at byte {error.start}; allowed: UTF-8") from None
    if _SIZES[name] == -1:
        return items
    if len(items) != 1:
        raise RequestError("INVALID_ARG", f"{name} has {len(items)} values; allowed: 1")
    return items[0]


def _parameters(request: Any) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(request.parameters() or "{}")
    return values
