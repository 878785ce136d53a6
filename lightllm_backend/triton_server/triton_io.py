# SPDX-License-Identifier: Apache-2.0
"""The one file that knows triton_python_backend_utils: from requests to plain values, and to responses. No torch.

The model.py files are thin because everything that touches a server's request or response is here.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lightllm_backend.config import PROBE_KEY_VARIABLE, ConfigError, EngineConfig
from lightllm_backend.generation.worker_group import EngineStartError
from lightllm_backend.launch.embedded_model import EmbeddedModelError, embedded_model_directory
from lightllm_backend.models.errors import ModelError
from lightllm_backend.option_table import integer
from lightllm_backend.options import ParsedRequest, parse_request
from lightllm_backend.request import FinishReason, RequestError, TokenChunk
from lightllm_backend.text import model_tokenizer as model_directory
from lightllm_backend.text.response import DecodeState, Response
from lightllm_backend.text.text_stream import Tokenizer, TokenizerError
from lightllm_backend.triton_server.metrics import Metrics
from lightllm_backend.triton_server.tensors import (
    CHUNK,
    ENSEMBLE,
    GENERATION_INPUTS,
    GENERATION_OUTPUTS,
    HEALTH_OUTPUTS,
    PUBLIC_INPUTS,
    PUBLIC_OUTPUTS,
    SAMPLING_PARAMETERS,
    Tensors,
)

with contextlib.suppress(ImportError):  # outside a stub, for tests
    import triton_python_backend_utils as pb_utils

_SIZES = {
    name: size
    for tensors in (PUBLIC_INPUTS, GENERATION_INPUTS, GENERATION_OUTPUTS)
    for name, (_, size) in tensors.items()
}
_NUMPY_TYPES: dict[str, Any] = {
    "STRING": np.object_, "INT32": np.int32, "FP32": np.float32, "BOOL": np.bool_, "UINT64": np.uint64,
}  # fmt: skip

# What a start may fail with through no fault of ours; the message says what to change.
_START_ERRORS = (ConfigError, EmbeddedModelError, EngineStartError, ModelError, RequestError, TokenizerError)

log = logging.getLogger("lightllm")


# Settings


def engine_config(arguments: dict[str, str]) -> EngineConfig:
    """The settings, for any of the models: the generation model's config.pbtxt, this model's own, the environment.

    arguments: what Triton server gives to `initialize`.
    """
    parameters = repository_parameters(_model_directory(arguments).parent)
    own = json.loads(arguments["model_config"]).get("parameters", {})
    parameters.update({key: value["string_value"] for key, value in own.items()})
    # Inside a stub the encoding of paths is ASCII: what is not is spelled there as os.environ spells it.
    parameters = {key: os.fsdecode(value.encode()) for key, value in parameters.items()}
    return EngineConfig.build(parameters, os.environ)


def repository_parameters(repository: Path) -> dict[str, str]:
    """The settings that stand in the generation model's config.pbtxt. ConfigError if it cannot be read."""
    from google.protobuf import text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    path = repository / "generation" / "config.pbtxt"
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such file; --model_repository must name the folder that has LightLLM's")
    try:
        parsed = text_format.Parse(path.read_text(encoding="utf-8"), ModelConfig())
    except text_format.ParseError as error:
        raise ConfigError(f"{path}: {error}") from None
    return {key: value.string_value for key, value in parsed.parameters.items()}


def load_tokenizer(config: EngineConfig) -> Tokenizer:
    directory = config.model_dir or embedded_model_directory(config.worker_python or "python3")
    return model_directory.load_tokenizer(directory, config)


def warn_of_tokens_past_model(tokenizer: Tokenizer) -> None:
    warning = model_directory.warning_of_tokens_past_model(tokenizer)
    if warning:
        log.warning(warning)


def metrics(with_engine: bool) -> Metrics:
    return Metrics(pb_utils, with_engine)


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """Surrounds a model's start: sets up the log, and hands what goes wrong to the server as one readable line.

    Python's log goes to the server's standard error, beside the server's own lines.
    """
    if isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr.reconfigure(encoding="utf-8", errors="surrogateescape")  # ASCII inside a stub
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname).1s %(name)s: %(message)s")
    try:
        yield
    except Exception as error:
        known = isinstance(error, _START_ERRORS)
        if not known:
            log.exception("the model cannot be loaded")
        # The stub cannot hand on a text that is not UTF-8.
        raise RuntimeError(readable(str(error) if known else f"{type(error).__name__}: {error}")) from None


def readable(text: str) -> str:
    """The text as UTF-8 can spell it, which paths inside a stub are not (see `engine_config`)."""
    try:
        return text.encode(errors="surrogateescape").decode(errors="replace")
    except UnicodeEncodeError:  # a lone surrogate that stands for no byte
        return text.encode(errors="replace").decode()


def _model_directory(arguments: dict[str, str]) -> Path:
    """Triton server names the model's directory or, in some modes, its config file or version folder."""
    path = Path(arguments["model_repository"])
    return path if (path / "config.pbtxt").exists() else path.parent


# Requests


def read_request(request: Any) -> ParsedRequest:
    """A client's request, from all its sources. RequestError INVALID_ARG if it cannot be read."""
    inputs = _inputs(request)
    return parse_request(inputs, inputs.pop(SAMPLING_PARAMETERS, None), _parameters(request))


def deadline(request: Any) -> float | None:
    """When the request must have ended, in time.monotonic() seconds: its `timeout`, in microseconds, from now.

    The generate endpoints have no field for it, so there it is a parameter.
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
    """Whether this is the launch command's probe, which knows the key that the server was started with."""
    key = os.environ.get(PROBE_KEY_VARIABLE, "")
    return bool(key) and "probe_key" in request.parameters() and _parameters(request).get("probe_key") == key


def read_generation_request(request: Any) -> tuple[ParsedRequest, dict[str, Any] | None]:
    """What the tokenizer sent, or a direct caller; and what the ensemble sent along, None for a direct caller."""
    inputs = _inputs(request)
    ensemble = inputs.pop(ENSEMBLE, None)
    # In the ensemble the request's parameters have been read by the tokenizer step.
    parameters = {} if ensemble else _parameters(request)
    parsed = parse_request(inputs, inputs.pop(SAMPLING_PARAMETERS, None), parameters)
    return parsed, json.loads(ensemble) if ensemble else None


def read_chunk(request: Any) -> tuple[TokenChunk | None, dict[str, Any]]:
    """A chunk and what came along: uid, return address, whether to ask, the state. A probe has no chunk."""
    inputs = _inputs(request)
    details = json.loads(inputs[CHUNK])
    if details.get("probe"):
        return None, details
    reason, error = details["finish_reason"], details["error"]
    chunk = TokenChunk(
        uid=details["uid"],
        token_ids=inputs["output_ids"],
        log_probs=inputs["output_log_probs"],
        finish_reason=FinishReason(reason) if reason else None,
        num_prompt_tokens=details["num_input_tokens"],
        error=RequestError.parse(error) if error else None,
    )
    return chunk, details


def _inputs(request: Any) -> dict[str, Any]:
    """What was sent, by name."""
    return {tensor.name(): _value(tensor) for tensor in request.inputs()}


def _value(tensor: Any) -> Any:
    """A tensor as a plain value: one item of those of size 1, a list of the others."""
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


# Responses


def tokens_response(token_ids: list[int], options_json: str, ensemble: dict[str, Any]) -> Any:
    """What the tokenizer sends to generation."""
    values = {"input_ids": token_ids, SAMPLING_PARAMETERS: [options_json], ENSEMBLE: [json.dumps(ensemble)]}
    return _response(GENERATION_INPUTS, values)


def client_response(response: Response, tokenizer: Tokenizer) -> Any:
    """What a client reads."""
    values = {
        "text_output": [response.text_output],
        "finish_reason": [response.finish_reason],
        "num_input_tokens": [response.num_input_tokens],
        "num_output_tokens": [len(response.output_ids)],
        "output_ids": response.output_ids,
        "output_log_probs": response.output_log_probs,
        "cumulative_logprob": [response.cumulative_logprob],
        "logprobs": [_logprobs_json(response, tokenizer)],
    }
    return _response(PUBLIC_OUTPUTS, values)


def health_response(report: str) -> Any:
    """What the `health` model answers if all is well."""
    return _response(HEALTH_OUTPUTS, {"report": [report]})


def _logprobs_json(response: Response, tokenizer: Tokenizer) -> str:
    """The log probabilities as vllm_backend's output `logprobs` has them: an object a token, by token id; else null.

    vLLM's rank of the token in the distribution is not known here.
    """
    if not response.output_log_probs:
        return "null"
    return json.dumps(
        [
            {token_id: {"logprob": log_prob, "rank": None, "decoded_token": tokenizer.decode([token_id], False)}}
            for token_id, log_prob in zip(response.output_ids, response.output_log_probs, strict=True)
        ]
    )


def error_response(error: Exception) -> Any:
    """The error with its status code, which unary calls see, and in its text, which the others see.

    What is not a RequestError is a fault of ours: it goes to the log, and its request alone ends with INTERNAL.
    """
    if not isinstance(error, RequestError):
        log.error("a request could not be handled", exc_info=error)
        error = RequestError("INTERNAL", f"{type(error).__name__}: {error}")
    code = getattr(pb_utils.TritonError, error.code)  # the server's names are ours
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(readable(str(error)), code))


def _response(names: Tensors, values: dict[str, Any]) -> Any:
    tensors = []
    for name, (kind, _) in names.items():
        items = [item.encode() for item in values[name]] if kind == "STRING" else values[name]
        tensors.append(pb_utils.Tensor(name, np.array(items, dtype=_NUMPY_TYPES[kind])))
    return pb_utils.InferenceResponse(output_tensors=tensors)


class ServerSender:
    """A response sender whose client may have gone: sending never fails. Nothing may be asked after the last one."""

    def __init__(self, request: Any) -> None:
        self._sender = request.get_response_sender()

    def send(self, response: Any | None, final: bool) -> None:
        """Send a response; with `final`, or only the flag where there is no response, as the last."""
        flags = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if final else 0
        try:
            if response is None:
                self._sender.send(flags=flags)
            else:
                self._sender.send(response, flags=flags)
        except Exception:
            log.exception("a response could not be sent")

    def is_cancelled(self) -> bool:
        return bool(self._sender.is_cancelled())


class GenerationResponder:
    """A Stream's way into the ensemble (or to a direct caller of generation, who gets errors as errors)."""

    def __init__(self, request: Any, uid: str, state: DecodeState, return_address: str, in_ensemble: bool) -> None:
        self._sender = ServerSender(request)
        self._uid = uid
        self._first_state = state.pack()
        self._return_address = return_address
        self._in_ensemble = in_ensemble

    def send(self, chunk: TokenChunk, state: list[Any] | None, ask: bool) -> None:
        final = chunk.finish_reason is not None
        if chunk.error is not None and not self._in_ensemble:
            self._sender.send(error_response(chunk.error), final)
            return
        details: dict[str, Any] = {
            "uid": self._uid,
            "finish_reason": chunk.finish_reason.value if chunk.finish_reason else "",
            "num_input_tokens": chunk.num_prompt_tokens,
            "error": str(chunk.error) if chunk.error else "",
        }
        if self._in_ensemble:
            details["state"] = self._first_state if state is None else state
            details |= {"return_address": self._return_address, "ask": ask}
        self._sender.send(self._chunk(chunk.token_ids, chunk.log_probs, details), final)

    def probe(self) -> None:
        details = {"uid": self._uid, "probe": True, "return_address": self._return_address, "ask": True}
        self._sender.send(self._chunk([], [], details), final=False)

    def is_cancelled(self) -> bool:
        return self._sender.is_cancelled()

    @staticmethod
    def _chunk(token_ids: list[int], log_probs: list[float], details: dict[str, Any]) -> Any:
        values = {"output_ids": token_ids, "output_log_probs": log_probs, CHUNK: [json.dumps(details)]}
        return _response(GENERATION_OUTPUTS, values)


class UnaryResponder:
    """A Stream's way to a unary caller: one response, made by `decode`."""

    def __init__(self, request: Any, decode: Callable[[TokenChunk], Response | None], tokenizer: Tokenizer) -> None:
        self._sender = ServerSender(request)
        self._decode = decode
        self._tokenizer = tokenizer

    def send(self, chunk: TokenChunk, state: list[Any] | None, ask: bool) -> None:  # noqa: ARG002, as a Responder's
        if chunk.error is not None:
            self._sender.send(error_response(chunk.error), final=True)
            return
        response = self._decode(chunk)
        assert response is not None, "the last chunk always gives a response"
        self._sender.send(client_response(response, self._tokenizer), final=True)

    def probe(self) -> None:
        raise AssertionError("a unary call has no detokenizer to probe")

    def is_cancelled(self) -> bool:
        return self._sender.is_cancelled()
