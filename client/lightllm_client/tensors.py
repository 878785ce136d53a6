# SPDX-License-Identifier: Apache-2.0
"""The ensemble's tensors: options to input tensors, output tensors to chunks."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np
from tritonclient.grpc import service_pb2

from lightllm_client.errors import Internal, InvalidArgument
from lightllm_client.options import DATATYPES, JSON, LISTS, OTHER_NAMES, Options


class _Scalar(NamedTuple):
    layout: str
    python_types: tuple[type, ...]
    allowed: str


_SCALARS: dict[str, _Scalar] = {
    "BOOL": _Scalar("<?", (bool, np.bool_), "True or False"),
    "INT32": _Scalar("<i", (Integral,), "an integer from -2**31 to 2**31 - 1"),
    "UINT64": _Scalar("<Q", (Integral,), "an integer from 0 to 2**64 - 1"),
    "FP32": _Scalar("<f", (Real,), "a number that 32-bit floating point holds"),
}


_MAX_TOKEN_ID = 2**31 - 1


class PromptLogProbs(NamedTuple):
    """The log probability of each prompt token but the first, and of the likeliest tokens in the place of each."""

    log_probs: tuple[float, ...]
    top: tuple[tuple[tuple[int, float], ...], ...]  # pairs of token id and log probability, the likeliest first


@dataclass(frozen=True)
class Chunk:
    """One response of a streamed request: its text and tokens are those since the previous one."""

    text: str
    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]  # empty unless return_log_probs
    cumulative_logprob: float  # over all tokens so far; 0 unless return_log_probs
    finish_reason: str  # "" until the last chunk, then "stop", "length" or "cancelled"
    num_input_tokens: int
    num_output_tokens: int  # new in this chunk
    num_cached_tokens: int = field(default=0, compare=False)  # of the prompt, which the server's prefix cache had
    prompt_log_probs: PromptLogProbs | None = None  # on the first chunk, if prompt_logprobs asks for them
    index: int = 0  # the number of the answer that the chunk belongs to, if n asks for several
    # For each token the likeliest ids with their log probabilities, likeliest first; empty unless top_logprobs.
    top_log_probs: tuple[dict[int, float], ...] = ()


_TOP = ("prompt_top_token_ids", "prompt_top_log_probs")


@dataclass(frozen=True)
class Generation:
    """A whole answer."""

    text: str
    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    cumulative_logprob: float
    finish_reason: str
    num_input_tokens: int
    num_output_tokens: int
    num_cached_tokens: int = field(default=0, compare=False)
    prompt_log_probs: PromptLogProbs | None = None  # if prompt_logprobs asks for them
    top_log_probs: tuple[dict[int, float], ...] = ()

    @classmethod
    def join_several(cls, chunks: Iterable[Chunk]) -> list[Generation]:
        """The whole answers of one request's chunks, in order of their numbers."""
        parts: dict[int, list[Chunk]] = {}
        for chunk in chunks:
            parts.setdefault(chunk.index, []).append(chunk)
        return [cls.join(parts[index]) for index in sorted(parts)]

    @classmethod
    def join(cls, chunks: Iterable[Chunk]) -> Generation:
        """The whole answer of one request's chunks, of which there is at least one."""
        parts = tuple(chunks)
        last = parts[-1]
        return cls(
            text="".join(part.text for part in parts),
            token_ids=tuple(token_id for part in parts for token_id in part.token_ids),
            log_probs=tuple(log_prob for part in parts for log_prob in part.log_probs),
            cumulative_logprob=last.cumulative_logprob,
            finish_reason=last.finish_reason,
            num_input_tokens=last.num_input_tokens,
            num_output_tokens=sum(part.num_output_tokens for part in parts),
            top_log_probs=tuple(likeliest for part in parts for likeliest in part.top_log_probs),
            prompt_log_probs=parts[0].prompt_log_probs,
            num_cached_tokens=last.num_cached_tokens,
        )


def infer_request(model: str, prompt: str | Sequence[int], stream: bool, options: Options) -> Any:
    """The ModelInferRequest for a prompt, which is text or token ids."""
    request = service_pb2.ModelInferRequest(model_name=model)

    def add(name: str, datatype: str, shape: int, content: bytes) -> None:
        request.inputs.add(name=name, datatype=datatype, shape=[shape])
        request.raw_input_contents.append(content)

    if isinstance(prompt, str):
        add("text_input", "BYTES", 1, _encode_strings("text_input", [prompt]))
    else:
        token_ids = _encode_token_ids(prompt)
        add("input_ids", "INT32", len(token_ids) // 4, token_ids)
    add("stream", "BOOL", 1, _encode_scalar("stream", "BOOL", stream))
    for name, value in options.items():
        datatype = DATATYPES.get(name)
        if datatype is None:
            meant = f"{OTHER_NAMES[name]} is meant; " if name in OTHER_NAMES else ""
            raise InvalidArgument(f"{name} is not an option; {meant}allowed: {', '.join(DATATYPES)}")
        items = _items(name, value)
        add(name, datatype, len(items), _encode(name, datatype, items))
    return request


def chunk_from_response(response: Any) -> Chunk:
    """The chunk that a ModelInferResponse holds.

    A client reads thousands of responses a second, and tritonclient's InferResult takes five times as long for one.
    """
    outputs = _Outputs(response)
    text = outputs.text("text_output")
    num_output_tokens = outputs.numbers("num_output_tokens", "i")[0]
    # Servers of version 0.2 do not tell the last five.
    prompt_log_probs = outputs.numbers("prompt_log_probs", "f", ())
    top_ids, top_values = outputs.numbers("top_token_ids", "i", ()), outputs.numbers("top_log_probs", "f", ())
    return Chunk(
        text=text,
        token_ids=outputs.numbers("output_ids", "i"),
        log_probs=outputs.numbers("output_log_probs", "f"),
        cumulative_logprob=outputs.numbers("cumulative_logprob", "f")[0],
        finish_reason=outputs.text("finish_reason"),
        num_input_tokens=outputs.numbers("num_input_tokens", "i")[0],
        num_output_tokens=num_output_tokens,
        top_log_probs=tuple(map(dict, _pairs(top_ids, top_values, num_output_tokens))) if top_ids else (),
        prompt_log_probs=_prompt_log_probs(outputs, prompt_log_probs) if prompt_log_probs else None,
        index=outputs.numbers("sequence_index", "i", (0,))[0],
        num_cached_tokens=outputs.numbers("num_cached_tokens", "i", (0,))[0],
    )


class _Outputs:
    """The output tensors of a response; Triton server sends them all as raw contents."""

    def __init__(self, response: Any) -> None:
        contents = response.raw_output_contents
        self._contents: dict[str, bytes] = {
            output.name: content for output, content in zip(response.outputs, contents, strict=False)
        }

    def text(self, name: str) -> str:
        """The first string of a tensor; its size comes before it."""
        content = self._content(name)
        return content[4 : 4 + int.from_bytes(content[:4], "little")].decode("utf-8", errors="replace")

    def numbers(self, name: str, kind: str, default: tuple[Any, ...] | None = None) -> tuple[Any, ...]:
        """All numbers of a tensor of 32-bit integers (i) or floats (f); `default` if there is no such tensor."""
        if default is not None and name not in self._contents:
            return default
        content = self._content(name)
        return struct.unpack(f"<{len(content) // 4}{kind}", content)

    def _content(self, name: str) -> bytes:
        try:
            return self._contents[name]
        except KeyError:
            raise Internal(f"the server's response has no output {name}") from None


def _prompt_log_probs(outputs: _Outputs, log_probs: tuple[float, ...]) -> PromptLogProbs:
    ids, values = outputs.numbers("prompt_top_token_ids", "i"), outputs.numbers("prompt_top_log_probs", "f")
    return PromptLogProbs(log_probs, tuple(_pairs(ids, values, len(log_probs))))


def _pairs(token_ids: Sequence[int], log_probs: Sequence[float], count: int) -> Iterator[tuple[tuple[int, float], ...]]:
    """Yield the pairs of token id and log probability of each of `count` tokens, which have equally many."""
    each = len(token_ids) // count
    for number in range(count):
        first = number * each
        yield tuple(zip(token_ids[first : first + each], log_probs[first : first + each], strict=True))


def _items(name: str, value: Any) -> Sequence[object]:
    if name in JSON and not isinstance(value, str):
        return [_biases_as_json(name, value) if name == "logit_bias" else _as_json(name, value)]
    one, several = (str, "strings") if DATATYPES[name] == "BYTES" else (Integral, "integers")
    if name not in LISTS or isinstance(value, one):
        return [value]
    if not isinstance(value, (Sequence, np.ndarray)) or isinstance(value, (str, bytes, bytearray)):
        raise InvalidArgument(f"{name} is {value!r}; allowed: one or a sequence of {several}")
    return list(value)


def _biases_as_json(name: str, value: Any) -> str:
    try:
        return json.dumps({int(token_id): float(bias) for token_id, bias in value.items()})
    except (AttributeError, TypeError, ValueError, OverflowError):
        raise InvalidArgument(f"{name} is {value!r}; allowed: a mapping of token ids to numbers, or its JSON") from None


def _as_json(name: str, value: Any) -> str:
    try:
        if isinstance(value, Mapping):
            return json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        pass
    raise InvalidArgument(f"{name} is {value!r}; allowed: a mapping of JSON values, or its JSON")


def _encode(name: str, datatype: str, items: Sequence[object]) -> bytes:
    if datatype == "BYTES":
        return _encode_strings(name, items)
    return b"".join(_encode_scalar(name, datatype, item) for item in items)


def _encode_scalar(name: str, datatype: str, value: object) -> bytes:
    scalar = _SCALARS[datatype]
    # Python takes True for the integer 1; a caller who writes max_tokens=True has made a mistake.
    if isinstance(value, scalar.python_types) and (datatype == "BOOL" or not isinstance(value, bool)):
        try:
            return struct.pack(scalar.layout, value)
        except (struct.error, OverflowError):
            pass  # out of range: reported below like a wrong type
    raise InvalidArgument(f"{name} is {value!r}; allowed: {scalar.allowed}")


def _encode_strings(name: str, strings: Sequence[object]) -> bytes:
    content = bytearray()
    for text in strings:
        if not isinstance(text, str):
            raise InvalidArgument(f"{name} holds {text!r}; allowed: strings")
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            raise InvalidArgument(
                f"{name} has the lone surrogate {text[error.start]!r} at {error.start}; allowed: text that UTF-8 holds"
            ) from None
        content += struct.pack("<I", len(data)) + data
    return bytes(content)


def _encode_token_ids(token_ids: Sequence[int]) -> bytes:
    if isinstance(token_ids, (bytes, bytearray)):
        raise InvalidArgument("the prompt is bytes; allowed: a string or a sequence of token ids")
    # Passes in C over the prompt: to look at each id here takes longer than all else that a request needs.
    for kind in set(map(type, token_ids)):
        if not issubclass(kind, Integral) or issubclass(kind, bool):
            wrong = next(token_id for token_id in token_ids if type(token_id) is kind)
            raise InvalidArgument(f"input_ids holds {wrong!r}; allowed: integers")
    for bound in (min, max):
        if not 0 <= (token_id := bound(token_ids, default=0)) <= _MAX_TOKEN_ID:
            raise InvalidArgument(f"input_ids holds {token_id}; allowed: ids of the model's vocabulary")
    return np.array(token_ids, dtype="<i4").tobytes()
