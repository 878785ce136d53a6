# SPDX-License-Identifier: Apache-2.0
"""Random requests to a real server, by every way in, and what each answer must be.

Triton server itself gets harmless requests: what is random are names and values that our models read. Types and sizes
of tensors are right, and JSON is cut at most, never nested deeply.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from hypothesis import strategies as st
from tritonclient.utils import InferenceServerException

from lightllm_backend.option_table import CANONICAL
from lightllm_backend.triton_server.tensors import PUBLIC_INPUTS
from tests.e2e.calls import GenerateStream, generate, infer_grpc, infer_http, stream_grpc
from tests.e2e.server import TritonServer
from tests.fuzz.values import EDGES, json_texts, json_values, mutated, scalars, texts

# What Triton server 2.51 answers with 500 before any model of ours sees the request.
TRITONS_500 = re.compile(
    r"failed to parse the request JSON buffer|Unable to parse|attempt to (access|get members)|Unexpected type|"
    r"expected .* to be of type|must be specified|Request parameter|was not found in the JSON"
)
_OUR_ERROR = re.compile(r"(in ensemble 'lightllm', )?(INVALID_ARG|UNAVAILABLE|CANCELLED): ")

ANSWERED, REFUSED, TRITONS_REFUSAL = "answered", "refused", "refused by Triton server"

# No number that asks for more than a few tokens and is allowed: there are to be many cases.
_integers = st.sampled_from([edge for edge in EDGES if edge != 64]) | st.integers(-9, 9)
_bytes = st.one_of(
    texts.map(lambda text: text.encode(errors="surrogatepass")),
    st.binary(max_size=9),
    json_texts(mutated({"max_tokens": 2}, tuple(CANONICAL)), deep=False).map(
        lambda text: text.encode(errors="surrogatepass")
    ),
)
_ELEMENTS: dict[str, st.SearchStrategy[Any]] = {
    "BOOL": st.booleans(),
    "INT32": _integers.filter(lambda value: -(2**31) <= value < 2**31),
    "UINT64": _integers.filter(lambda value: 0 <= value < 2**64),
    "FP32": st.floats(width=32),
    "STRING": _bytes,
}
_parameters = st.dictionaries(
    st.sampled_from((*CANONICAL, "colour", "timeout_", "id")) | st.text("abc_", min_size=1, max_size=9),
    st.one_of(_integers.filter(lambda value: abs(value) < 2**63), st.booleans(), st.text(max_size=9)),
    max_size=2,
)


@st.composite
def _tensors(draw: st.DrawFn) -> dict[str, Any]:
    values: dict[str, Any] = {"text_input": b"Hi", "max_tokens": 2}
    for name in draw(st.lists(st.sampled_from(sorted(PUBLIC_INPUTS)), max_size=4)):
        datatype, size = PUBLIC_INPUTS[name]
        elements = _ELEMENTS[datatype]
        values[name] = draw(elements if size == 1 else st.lists(elements, max_size=4))
    return values


@st.composite
def _objects(draw: st.DrawFn) -> dict[str, Any]:
    """The JSON object of a generate request: mostly of the types that Triton server converts, so that we see it."""
    body: dict[str, Any] = {"text_input": "Hi", "max_tokens": 2}
    for name in draw(st.lists(st.sampled_from((*CANONICAL, "parameters", "colour")), max_size=4)):
        datatype, size = PUBLIC_INPUTS.get(name, ("", 1))
        if name == "parameters":
            body[name] = draw(_parameters)
        elif not datatype or draw(st.integers(0, 9)) == 0:
            body[name] = draw(scalars | json_values)
        elif datatype == "STRING" and size == 1:
            body[name] = draw(texts | json_texts(mutated({"max_tokens": 2}, tuple(CANONICAL)), deep=False))
        else:
            elements = texts if datatype == "STRING" else _ELEMENTS[datatype]
            body[name] = draw(elements if size == 1 else st.lists(elements, max_size=4))
    return body


_bodies = st.one_of(*[_objects().map(json.dumps)] * 4, json_texts(_objects(), deep=False)).map(
    lambda text: text.encode(errors="surrogatepass")
)


class Call(NamedTuple):
    """A request and its way in."""

    way: str
    request: Any  # a body, or tensors and parameters


calls = st.one_of(
    st.builds(Call, st.sampled_from(("generate", "generate_stream")), _bodies),
    st.builds(
        Call,
        st.sampled_from(("HTTP infer, JSON", "HTTP infer, binary", "gRPC infer", "gRPC stream")),
        st.tuples(_tensors(), _parameters),
    ),
)


def check(server: TritonServer, call: Call) -> str:
    """Send the request; return what became of it: a right answer, or a clear error that is no fault of the server."""
    if call.way == "generate":
        return _check_status(*generate(server, call.request))
    if call.way == "generate_stream":
        return _check_stream(GenerateStream(server, call.request))
    values, parameters = call.request
    ways: dict[str, Callable[[], object]] = {
        "HTTP infer, JSON": lambda: infer_http(server, values, parameters=parameters, binary=False),
        "HTTP infer, binary": lambda: infer_http(server, values, parameters=parameters),
        "gRPC infer": lambda: infer_grpc(server, values, parameters=parameters),
        "gRPC stream": lambda: stream_grpc(server, values, parameters=parameters),
    }
    try:
        ways[call.way]()
    except InferenceServerException as error:
        return _check_error(error.message(), error.status() == "500")
    return ANSWERED


def _check_stream(stream: GenerateStream) -> str:
    if stream.status != 200:
        return _check_status(stream.status, next(stream))
    outcome = ANSWERED
    for event in stream:
        if "error" in event:
            outcome = _check_error(event["error"], is_500=False)
        else:
            assert _is_text(event["text_output"])
    return outcome


def _check_status(status: int, answer: dict[str, Any]) -> str:
    if status == 200 and "error" not in answer:
        assert _is_text(answer["text_output"])
        return ANSWERED
    assert status in (200, 400, 500, 503)
    return _check_error(answer["error"], status == 500)


def _is_text(said: Any) -> bool:
    """Whether that is a text, or one for each of several answers."""
    return all(isinstance(text, str) for text in (said if isinstance(said, list) else [said]))


def _check_error(message: str, is_500: bool) -> str:
    assert message
    assert "INTERNAL" not in message
    assert not is_500 or TRITONS_500.search(message), message
    is_ours = "INVALID_ARG" in message or "UNAVAILABLE" in message
    if not is_500 and is_ours:
        assert _OUR_ERROR.match(message), message
    return REFUSED if is_ours else TRITONS_REFUSAL
