# SPDX-License-Identifier: Apache-2.0
"""Reads the requests that Triton server hands to the models. No torch."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lightllm_backend.config import PROBE_KEY_VARIABLE
from lightllm_backend.messages.ensemble_messages import ChunkMessage, EnsembleContext
from lightllm_backend.messages.seal import NotSealed, Seal
from lightllm_backend.option_table import integer
from lightllm_backend.options import ParsedRequest, parse_request, show
from lightllm_backend.request import RequestError, RequestOptions
from lightllm_backend.triton_server.tensors import (
    DETOKENIZER_INPUTS,
    ENSEMBLE,
    GENERATION_INPUTS,
    PUBLIC_INPUTS,
    SAMPLING_PARAMETERS,
    SEALED_CHUNK,
)

_TENSORS = {**PUBLIC_INPUTS, **GENERATION_INPUTS, **DETOKENIZER_INPUTS}


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
        raise RequestError("INVALID_ARG", f"timeout is {show(timeout)}; allowed: an integer ≥ 0, of microseconds")
    return time.monotonic() + seconds if seconds else None


def is_probe(request: Any) -> bool:
    """Whether this is the launch command's probe, which knows the key with which it started the server."""
    key = os.environ.get(PROBE_KEY_VARIABLE, "")
    return bool(key) and "probe_key" in _parameter_text(request) and _parameters(request).get("probe_key") == key


class GenerationRequest(NamedTuple):
    """A request to generation."""

    token_ids: Sequence[int]
    options: RequestOptions
    deadline: float | None
    context: EnsembleContext | None  # None: a direct call, which has no detokenizer behind it


def read_generation_request(request: Any, seal: Seal) -> GenerationRequest:
    """A request of the ensemble, which the tokenizer step has checked and sealed, or a direct call's."""
    inputs = _inputs(request)
    sealed = inputs.pop(ENSEMBLE, None)
    if sealed is None:
        parsed = parse_request(inputs, inputs.pop(SAMPLING_PARAMETERS, None), _parameters(request))
        return GenerationRequest(parsed.token_ids or (), parsed.options, read_deadline(request), None)
    token_ids = inputs["input_ids"]
    context = EnsembleContext.unpack(_opened(ENSEMBLE, "tokenizer", seal, sealed, token_id_bytes(token_ids)))
    return GenerationRequest(token_ids, context.options, context.deadline, context)


def read_chunk(request: Any, seal: Seal) -> ChunkMessage:
    """A chunk that generation has sealed."""
    return ChunkMessage.unpack(_opened(SEALED_CHUNK, "generation", seal, _inputs(request)[SEALED_CHUNK]))


def token_id_bytes(token_ids: Sequence[int]) -> bytes:
    """The token ids as a seal covers them."""
    return np.array(token_ids, dtype=np.int32).tobytes()


def _opened(name: str, step: str, seal: Seal, sealed: bytes, beside: bytes = b"") -> bytes:
    try:
        return seal.open(sealed, beside)
    except NotSealed:
        allowed = f"what the {step} step of this server made"
        raise RequestError("INVALID_ARG", f"{name} does not bear this server's seal; allowed: {allowed}") from None


def _inputs(request: Any) -> dict[str, Any]:
    """The values of the request's tensors, by name."""
    return {tensor.name(): _value(tensor) for tensor in request.inputs()}


def _value(tensor: Any) -> Any:
    """A tensor as a plain value: bytes, an item if its size is 1, else a list."""
    name = tensor.name()
    kind, size = _TENSORS[name]
    if kind == "UINT8":
        return tensor.as_numpy().tobytes()
    items = tensor.as_numpy().reshape(-1).tolist()
    try:
        items = [item.decode() if isinstance(item, bytes) else item for item in items]
    except UnicodeDecodeError as error:
        raise RequestError("INVALID_ARG", f"{name} is not UTF-8 at byte {error.start}; allowed: UTF-8") from None
    if size == -1:
        return items
    if len(items) != 1:
        raise RequestError("INVALID_ARG", f"{name} has {len(items)} values; allowed: 1")
    return items[0]


def _parameters(request: Any) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(_parameter_text(request) or "{}")
    return values


def _parameter_text(request: Any) -> str:
    """The request's parameters as JSON. The server takes any bytes for a name or a text."""
    try:
        text: str = request.parameters()
    except UnicodeDecodeError as error:
        where = f"at byte {error.start} of {show(error.object.decode(errors='replace'))}"
        raise RequestError("INVALID_ARG", f"a request parameter is not UTF-8 {where}; allowed: UTF-8") from None
    return text
