# SPDX-License-Identifier: Apache-2.0
"""Makes and sends the responses of the models: to the next step, or to a client. No torch."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from lightllm_backend.messages.ensemble_messages import ChunkMessage, EnsembleContext
from lightllm_backend.messages.seal import Seal
from lightllm_backend.request import TOP_LOG_PROB, PromptLogProbs, RequestError, TokenChunk
from lightllm_backend.text.response import Response
from lightllm_backend.text.tokenizer import Tokenizer
from lightllm_backend.triton_server.requests import token_id_bytes
from lightllm_backend.triton_server.setup import readable
from lightllm_backend.triton_server.tensors import (
    CHUNK,
    DETOKENIZER_INPUTS,
    DIRECT_OUTPUTS,
    ENSEMBLE,
    HEALTH_OUTPUTS,
    PROMPT_OUTPUTS,
    PUBLIC_OUTPUTS,
    SEALED_CHUNK,
    TOKENIZER_OUTPUTS,
    TOP_LOG_PROBS,
    Tensors,
)

with contextlib.suppress(ImportError):  # only a stub has it; tests put a stand-in here
    import triton_python_backend_utils as pb_utils

_NUMPY_TYPES: dict[str, Any] = {
    "STRING": np.object_, "INT32": np.int32, "FP32": np.float32, "BOOL": np.bool_, "UINT64": np.uint64,
    "UINT8": np.uint8,
}  # fmt: skip

log = logging.getLogger("lightllm")


def tokens_response(token_ids: list[int], context: EnsembleContext, seal: Seal) -> Any:
    """The tokenizer's response, which generation reads."""
    sealed = seal.close(context.pack(), token_id_bytes(token_ids))
    return _response(TOKENIZER_OUTPUTS, {"input_ids": token_ids, ENSEMBLE: sealed})


def client_response(response: Response, tokenizer: Tokenizer, kept: KeptTensors | None = None) -> Any:
    """The response that a client reads. kept: tensors to use again, of the one thread that sends them."""
    if kept is None:
        return _response(PUBLIC_OUTPUTS, _values(response, tokenizer))
    return pb_utils.InferenceResponse(output_tensors=kept.tensors(response, tokenizer))


def answers_response(responses: Sequence[Response], tokenizer: Tokenizer) -> Any:
    """The one response to a request with several answers, in order."""
    first, *others = (_values(response, tokenizer) for response in responses)
    for values in others:
        for name in PUBLIC_OUTPUTS.keys() - PROMPT_OUTPUTS.keys() - _OF_THE_PROMPT:
            first[name] = first[name] + values[name]
    return _response(PUBLIC_OUTPUTS, first)


def _values(response: Response, tokenizer: Tokenizer) -> dict[str, Any]:
    return {**_new_values(response), **_common_values(response), **_asked_values(response, tokenizer)}


def _new_values(response: Response) -> dict[str, Any]:
    """What is seldom the same in two responses."""
    return {"text_output": [response.text_output], "output_ids": response.output_ids}


def _common_values(response: Response) -> dict[str, list[Any]]:
    """What has one of a few values."""
    return {
        "finish_reason": [response.finish_reason],
        "num_input_tokens": [response.num_input_tokens],
        "num_cached_tokens": [response.num_cached_tokens],
        "num_output_tokens": [len(response.output_ids)],
        "sequence_index": [response.index],
    }


def _asked_values(response: Response, tokenizer: Tokenizer) -> dict[str, Any]:
    """What is empty, or 0, unless the request asks for it."""
    return {
        "output_log_probs": response.output_log_probs,
        "cumulative_logprob": [response.cumulative_logprob],
        "logprobs": [_logprobs_json(response, tokenizer)],
        **_top_log_probs(response.top_log_probs),
        **_prompt_values(response.prompt_log_probs),
    }


_OF_THE_PROMPT = frozenset(["num_input_tokens", "num_cached_tokens"])
_MOST_KEPT = 512  # each takes some hundred bytes of shared memory


class KeptTensors:
    """Makes the tensors of client responses, and keeps those that are the same in many: all but two.

    The backend copies a tensor into shared memory when it is first sent, and not again. Two threads must not send one
    at the same time, so each thread has its own.
    """

    def __init__(self) -> None:
        self._common: dict[tuple[str, Any], Any] = {}
        self._unasked: list[Any] = []  # of a response whose request asks for nothing more

    def tensors(self, response: Response, tokenizer: Tokenizer) -> list[Any]:
        tensors = [_tensor(PUBLIC_OUTPUTS, name, value) for name, value in _new_values(response).items()]
        tensors += [self._common_tensor(name, value) for name, value in _common_values(response).items()]
        asked = response.output_log_probs or response.cumulative_logprob or response.prompt_log_probs
        if not asked and self._unasked:
            return tensors + self._unasked
        others = [_tensor(PUBLIC_OUTPUTS, name, value) for name, value in _asked_values(response, tokenizer).items()]
        if not asked:
            self._unasked = others
        return tensors + others

    def _common_tensor(self, name: str, value: list[Any]) -> Any:
        key = (name, value[0])
        tensor = self._common.get(key)
        if tensor is None:
            if len(self._common) >= _MOST_KEPT:
                del self._common[next(iter(self._common))]  # the oldest
            tensor = self._common[key] = _tensor(PUBLIC_OUTPUTS, name, value)
        return tensor


def health_response(report: str) -> Any:
    """The answer of the `health` model if all is well."""
    return _response(HEALTH_OUTPUTS, {"report": [report]})


def _logprobs_json(response: Response, tokenizer: Tokenizer) -> str:
    """The log probabilities in the format of vllm_backend's output `logprobs`: an object a token, by token id; or null.

    Each object has the sampled token, then the likeliest ones. The rank of a token beyond these is not known.
    """
    if not response.output_log_probs:
        return "null"
    pairs = np.frombuffer(response.top_log_probs, TOP_LOG_PROB).reshape(len(response.output_ids), -1).tolist()
    tokens = []
    for token_id, log_prob, likeliest in zip(response.output_ids, response.output_log_probs, pairs, strict=True):
        known = {token_id: (log_prob, None)} | {other: (its, rank) for rank, (other, its) in enumerate(likeliest, 1)}
        tokens.append(
            {
                one: {"logprob": its, "rank": rank, "decoded_token": tokenizer.decode([one], False)}
                for one, (its, rank) in known.items()
            }
        )
    return json.dumps(tokens)


def _top_log_probs(packed: bytes) -> dict[str, list[Any]]:
    """The tensors of packed TOP_LOG_PROBs."""
    if not packed:
        return {name: [] for name in TOP_LOG_PROBS}
    pairs = np.frombuffer(packed, TOP_LOG_PROB)
    return {"top_token_ids": pairs["token_id"].tolist(), "top_log_probs": pairs["log_prob"].tolist()}


def error_response(error: Exception) -> Any:
    """The error with its code, which also begins the text: only unary calls see the status code.

    An error that is not a RequestError is a bug of ours: it is logged, and its request alone ends with INTERNAL.
    """
    if not isinstance(error, RequestError):
        log.error("a request could not be handled", exc_info=error)
        error = RequestError("INTERNAL", f"{type(error).__name__}: {error}")
    code = getattr(pb_utils.TritonError, error.code)  # the server's names are ours
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(readable(str(error)), code))


def _prompt_values(prompt: PromptLogProbs | None) -> dict[str, bytes]:
    return dict(zip(PROMPT_OUTPUTS, prompt or PromptLogProbs(), strict=True))


def _response(names: Tensors, values: dict[str, Any]) -> Any:
    return pb_utils.InferenceResponse(output_tensors=[_tensor(names, name, values[name]) for name in names])


def _tensor(names: Tensors, name: str, value: Any) -> Any:
    return pb_utils.Tensor(name, _array(names[name][0], value))


def _array(kind: str, value: Any) -> Any:
    """The tensor's contents, from a list or from packed bytes."""
    if isinstance(value, bytes):
        return np.frombuffer(value, dtype=_NUMPY_TYPES[kind])
    items = [item.encode() for item in value] if kind == "STRING" else value
    return np.array(items, dtype=_NUMPY_TYPES[kind])


def sealed_chunk(seal: Seal, message: ChunkMessage) -> Any:
    """The response that the detokenizer reads."""
    return _response(DETOKENIZER_INPUTS, {SEALED_CHUNK: seal.close(message.pack())})


def direct_response(chunk: TokenChunk) -> Any:
    """The response that a direct caller of generation reads."""
    details = {
        "uid": chunk.uid,
        "finish_reason": chunk.finish_reason.value if chunk.finish_reason else "",
        "num_input_tokens": chunk.num_prompt_tokens,
        "num_cached_tokens": chunk.num_cached_tokens,
        "error": "",
    }
    values = {
        "output_ids": chunk.token_ids,
        "output_log_probs": chunk.log_probs,
        **_top_log_probs(chunk.top_log_probs),
        **_prompt_values(chunk.prompt_log_probs),
        CHUNK: [json.dumps(details)],
    }
    return _response(DIRECT_OUTPUTS, values)


class ServerSender:
    """A response sender that never fails, since its client may be gone. No call may follow the last response."""

    def __init__(self, request: Any) -> None:
        self._sender = request.get_response_sender()

    def send(self, response: Any | None, final: bool) -> None:
        """Send a response, or none; `final` says that no more will come."""
        flags = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if final else 0
        try:
            if response is None:
                self._sender.send(flags=flags)
            else:
                self._sender.send(response, flags=flags)
        except Exception:
            log.exception("a response could not be sent")

    def is_cancelled(self) -> bool:
        """Whether the client has cancelled the request. After the last response this crashes the server."""
        return bool(self._sender.is_cancelled())
