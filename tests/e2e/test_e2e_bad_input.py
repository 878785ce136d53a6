# SPDX-License-Identifier: Apache-2.0
"""What a request may not say: each is refused by name, and the server goes on as before."""

from __future__ import annotations

import json
import queue
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
import tritonclient.grpc
from tritonclient.utils import InferenceServerException

from lightllm_backend.messages.ensemble_messages import ChunkMessage, EnsembleContext
from lightllm_backend.messages.seal import Purpose, Seal
from lightllm_backend.request import RequestOptions, TokenChunk
from lightllm_backend.text.response import DecodeState
from lightllm_client import InvalidArgument, LightLLMClient
from tests.e2e.calls import NO_PROXY, generate, infer_grpc, infer_http, stream_grpc, tensors
from tests.e2e.conftest import SHORT_MODEL_SAYS
from tests.e2e.server import TritonServer
from tests.polling import poll

pytestmark = pytest.mark.e2e

NAN, INFINITE = float("nan"), float("inf")
# The request's tensors, and what the message must say: the key, the value and what is allowed.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "empty prompt": ({"text_input": ""}, r'text_input is ""; allowed: a string that is not empty'),
    "no prompt": ({"max_tokens": 3}, r"none of text_input and input_ids given; allowed: exactly one"),
    "two prompts": ({"text_input": "a", "input_ids": [1]}, r"both of text_input and input_ids given; allowed:"),
    "prompt not UTF-8": ({"text_input": b"ab\xff"}, r"text_input is not UTF-8 at byte 2; allowed: UTF-8"),
    "stop word not UTF-8": ({"text_input": "a", "stop_words": b"\xc3"}, r"stop_words is not UTF-8 at byte 0; allowed"),
    "10 MB": ({"text_input": "x" * 10_000_000}, r"text_input has 10000000 bytes; allowed: at most 1048576"),
    "long prompt": (
        {"text_input": "a " * 9000},
        r"prompt has 9001 tokens and max_tokens is 16; allowed: at most 8191 prompt tokens \(the model's limit\)",
    ),
    "long in all": (
        {"text_input": "a", "max_tokens": 8192},
        r"prompt has 1 tokens and max_tokens is 8192; allowed: at most 8192 in all \(the model's limit\)",
    ),
    "unknown token": ({"input_ids": [1, 49152]}, r"input_ids holds 49152; allowed: 0 ≤ id < 49152"),
    "negative token": ({"input_ids": [5, -1]}, r"input_ids is \[5, -1\], which holds -1; allowed: .* ≥ 0"),
    "negative token with the echo on": (
        {"input_ids": [-1, 5], "exclude_input_in_output": False},
        r"input_ids is \[-1, 5\], which holds -1; allowed: .* ≥ 0",
    ),
    "no tokens": ({"text_input": "a", "max_tokens": 0}, r"max_tokens is 0; allowed: -1 \(as many as fit\), 0 "),
    "negative": ({"text_input": "a", "max_tokens": -2}, r"max_tokens is -2; allowed: -1 \(as many as fit\), .*"),
    "too many": ({"text_input": "a", "max_tokens": 2**31 - 1}, r"max_tokens is 2147483647; allowed: .* 8192"),
    "top_p 0": ({"text_input": "a", "top_p": 0.0}, r"top_p is 0.0; allowed: 0 < top_p ≤ 1"),
    "top_p NaN": ({"text_input": "a", "top_p": NAN}, r"top_p is nan; allowed: 0 < top_p ≤ 1"),
    "top_k": ({"text_input": "a", "top_k": -2}, r"top_k is -2; allowed: -1 or 0 \(off\), or an integer"),
    "temperature NaN": ({"text_input": "a", "temperature": NAN}, r"temperature is nan; allowed: a finite"),
    "temperature infinite": ({"text_input": "a", "temperature": INFINITE}, r"temperature is inf; allowed: a finite"),
    "temperature negative": ({"text_input": "a", "temperature": -1.0}, r"temperature is -1.0; allowed: .* ≥ 0"),
    "presence NaN": ({"text_input": "a", "presence_penalty": NAN}, r"presence_penalty is nan; allowed: a finite"),
    "frequency infinite": (
        {"text_input": "a", "frequency_penalty": -INFINITE},
        r"frequency_penalty is -inf; allowed: a finite",
    ),
    "repetition 0": ({"text_input": "a", "repetition_penalty": 0.0}, r"repetition_penalty is 0.0; allowed: .* > 0"),
    "min_tokens": ({"text_input": "a", "min_tokens": 17}, r"min_tokens is 17; allowed: from 0 to max_tokens \(16\)"),
    "33 stop words": ({"text_input": "a", "stop_words": ["x"] * 33}, r"stop_words is .*; allowed: .* at most 32"),
    "long stop word": ({"text_input": "a", "stop_words": ["x" * 1025]}, r"stop_words is .*; allowed: .* 1024 bytes"),
}
# The same for the JSON string `sampling_parameters`.
REFUSED_JSON: dict[str, tuple[str, str]] = {
    "not JSON": ("{", r"sampling_parameters is not JSON .*; allowed: a JSON object"),
    "no object": ("[1]", r"sampling_parameters is \[1\]; allowed: a JSON object"),
    "unknown key": (
        '{"max_token": 3}',
        r"max_token is not a parameter \(did you mean max_tokens\?\); allowed: .*top_p",
    ),
    "wrong type": ('{"max_tokens": [3]}', r"max_tokens is \[3\]; allowed: -1 \(as many as fit\), .*"),
    "boolean number": ('{"max_tokens": true}', r"max_tokens is true; allowed: -1 \(as many as fit\), .*"),
    "text number": ('{"temperature": "warm"}', r'temperature is "warm"; allowed: a finite temperature ≥ 0'),
    "number boolean": ('{"ignore_eos": 2}', r"ignore_eos is 2; allowed: true or false"),
    "NaN": ('{"temperature": NaN}', r"temperature is nan; allowed: a finite"),
    "huge number": ('{"temperature": 1e999}', r"temperature is inf; allowed: a finite"),
    "several answers": ('{"n": 17}', r"n is 17; allowed: an integer from 1 to 16"),
    "seed": ('{"seed": -2}', r"seed is -2; allowed: -1 \(drawn\), or an integer from 0 to 18446744073709551615"),
    "twice": ('{"max_tokens": 3, "max_new_tokens": 3}', r"max_new_tokens is given beside max_tokens; allowed: one of"),
    "nested": (
        "[" * 100_000,
        r'sampling_parameters is "\[*…, which is nested more than 64 levels deep; allowed: a JSON',
    ),
    "nested text": (
        json.dumps({"stop_token_ids": "[" * 5000}),
        r'stop_token_ids is "\[*…, which is nested more than 64 levels deep; allowed: ',
    ),
    "long unknown key": (json.dumps({"k" * 10**6: 1}), r"k{77}… is not a parameter; allowed: "),
    "lone surrogate": ('{"stop": "\\ud800"}', r"stop is .*; allowed: a string or a list"),
}


@pytest.fixture(autouse=True)
def nothing_remains(server: TritonServer, client: LightLLMClient) -> Iterator[None]:
    """After each bad request a good one is answered, and nothing is held."""
    yield
    assert client.generate("The capital of Japan is", max_tokens=1).text == SHORT_MODEL_SAYS
    assert poll(server.is_idle), server.metrics()


@pytest.mark.parametrize(("request_tensors", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_tensors(server: TritonServer, request_tensors: dict[str, Any], message: str) -> None:
    with pytest.raises(InferenceServerException) as refused:
        stream_grpc(server, request_tensors)
    assert re.match(f"(in ensemble 'lightllm', )?INVALID_ARG: .*{message}", refused.value.message())
    for infer, status in ((infer_http, "400"), (infer_grpc, "StatusCode.INVALID_ARGUMENT")):
        with pytest.raises(InferenceServerException) as refused:
            infer(server, request_tensors)
        assert re.match(f"INVALID_ARG: .*{message}", refused.value.message())
        assert refused.value.status() == status


@pytest.mark.parametrize(("parameters", "message"), REFUSED_JSON.values(), ids=REFUSED_JSON)
def test_refused_json(server: TritonServer, parameters: str, message: str) -> None:
    status, answer = generate(server, {"text_input": "a", "sampling_parameters": parameters})
    assert status == 400
    assert re.match(f"in ensemble 'lightllm', INVALID_ARG: {message}", answer["error"])


def test_refused_parameters(server: TritonServer) -> None:
    with pytest.raises(InferenceServerException, match="INVALID_ARG: colour is not a parameter; allowed: .*max_tokens"):
        stream_grpc(server, {"text_input": "a"}, parameters={"colour": "red"})
    with pytest.raises(InferenceServerException, match="INVALID_ARG: top_p is .*2.*; allowed: 0 < top_p ≤ 1"):
        stream_grpc(server, {"text_input": "a"}, parameters={"top_p": "2"})
    status, answer = generate(server, {"text_input": "a", "parameters": {"colour": 1}})
    assert status == 400
    assert "INVALID_ARG: colour is not a parameter" in answer["error"]


def test_a_parameter_that_is_not_utf8(server: TritonServer) -> None:
    for model in ("lightllm", "lightllm_unary"):
        status, answer = generate(server, b'{"text_input": "a", "colo\xff": 1}', model=model)
        assert status == 400
        assert "INVALID_ARG: a request parameter is not UTF-8 at byte 6 of " in answer["error"]
        assert answer["error"].endswith("; allowed: UTF-8")


@pytest.mark.parametrize("timeout", ["true", "0.5", '"soon"', "-1"])
def test_a_timeout_of_another_type(server: TritonServer, timeout: str) -> None:
    for body in ('{"text_input": "a", "timeout": %s}', '{"text_input": "a", "parameters": {"timeout": %s}}'):
        status, answer = generate(server, (body % timeout).encode())
        assert (status, answer["error"]) == (
            400,
            f"in ensemble 'lightllm', INVALID_ARG: timeout is {timeout}; allowed: an integer ≥ 0, of microseconds",
        )


PROMPT_IDS = [504, 3575, 282]  # "The capital of"
# What a stranger may try at a step: the model, its tensors, and what the answer says.
STRANGERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "chunk of nothing": ("detokenizer", {"sealed_chunk": [0] * 64}, "sealed_chunk does not bear this server's seal"),
    "short chunk": ("detokenizer", {"sealed_chunk": [7]}, "sealed_chunk does not bear this server's seal"),
    "chunk without a seal": (
        "detokenizer",
        {"sealed_chunk": ChunkMessage("0-uid", TokenChunk("0-uid", [5], []), DecodeState().pack(), True).pack()},
        "sealed_chunk does not bear this server's seal",
    ),
    "question about another's uid": (
        "detokenizer",
        {"sealed_chunk": Seal(b"x" * 32, Purpose.CHUNK).close(ChunkMessage("0-uid", None, b"", True).pack())},
        "sealed_chunk does not bear this server's seal",
    ),
    "chunk of the old form": (
        "detokenizer", {"sealed_chunk": json.dumps({"uid": "0-uid"}).encode()}, "sealed_chunk does not bear",
    ),
    "context without a seal": (
        "generation",
        {"input_ids": PROMPT_IDS, "ensemble": EnsembleContext(RequestOptions(), "", None).pack()},
        "ensemble does not bear this server's seal; allowed: what the tokenizer step of this server made",
    ),
    "context of a wrong type": (
        "generation", {"input_ids": PROMPT_IDS, "ensemble": b"[1]"}, "ensemble does not bear this server's seal",
    ),
    "direct call with private options": (
        "generation",
        {"input_ids": PROMPT_IDS, "sampling_parameters": '{"deadline": "soon"}'},
        "deadline is not a parameter",
    ),
    "direct call with a negative token": ("generation", {"input_ids": [5, -1]}, "which holds -1; allowed"),
}  # fmt: skip


def test_strangers_at_the_single_steps_are_refused_and_others_go_on(
    server: TritonServer, client: LightLLMClient
) -> None:
    processes = {one.pid for one in server.processes()}
    restarts = server.metrics()["lightllm_engine_restarts_total"]
    expected = client.generate("The capital of Japan is", max_tokens=24, ignore_eos=True)
    stream = client.stream("The capital of Japan is", max_tokens=24, ignore_eos=True)
    received = [next(stream)]
    for model, values, message in STRANGERS.values():
        with pytest.raises(InferenceServerException, match="INVALID_ARG: .*" + re.escape(message)):
            stream_grpc(server, values, model=model)
    received += stream
    assert [token_id for chunk in received for token_id in chunk.token_ids] == list(expected.token_ids)
    assert {one.pid for one in server.processes()} == processes
    assert server.metrics()["lightllm_engine_restarts_total"] == restarts


def test_who_runs_the_steps_himself_harms_nobody_else(server: TritonServer, client: LightLLMClient) -> None:
    """Each step believes what the one before made; a seal cannot be taken off one request and put on another."""
    client.generate("The capital of Japan is", max_tokens=1)  # so that the answer comes before a question to the client
    made = infer_grpc(server, {"text_input": "The capital of Japan is", "max_tokens": 1}, model="tokenizer")
    with pytest.raises(InferenceServerException, match="INVALID_ARG: ensemble does not bear this server's seal"):
        stream_grpc(server, {**made, "input_ids": [*made["input_ids"], 5]}, model="generation")
    [chunk] = stream_grpc(server, made, model="generation")
    assert list(chunk) == ["sealed_chunk"]
    for _ in range(3):  # the same chunk as often as he likes
        [answer] = stream_grpc(server, chunk, model="detokenizer")
        assert (answer["text_output"], answer["finish_reason"]) == (SHORT_MODEL_SAYS, "length")
    # A stream whose chunks nobody acknowledges stays at its first one, and ends when its caller goes.
    endless = infer_grpc(
        server, {"text_input": "Hello", "max_tokens": 500, "stream": True, "ignore_eos": True}, model="tokenizer"
    )
    with tritonclient.grpc.InferenceServerClient(server.grpc_url, channel_args=NO_PROXY) as stranger:
        responses: queue.Queue[Any] = queue.Queue()
        stranger.start_stream(callback=lambda result, error: responses.put((result, error)))
        for _ in range(4):
            stranger.async_stream_infer("generation", tensors(tritonclient.grpc, endless))
        assert [error for _, error in (responses.get(timeout=60) for _ in range(4))] == [None] * 4
        assert client.generate("The capital of Japan is", max_tokens=1).text == SHORT_MODEL_SAYS
        stranger.stop_stream(cancel_requests=True)


@pytest.mark.parametrize(
    "body",
    [
        b'{"text_input": "\\ud800"}',
        b"no JSON",
        json.dumps({"text_input": 5}).encode(),
        json.dumps({"text_input": ["a", "b"]}).encode(),
        json.dumps({"text_input": "a", "max_tokens": "three"}).encode(),
        json.dumps({"text_input": "a", "parameters": {"colour": ["red"]}}).encode(),
    ],
)
def test_what_the_server_itself_refuses(server: TritonServer, body: bytes) -> None:
    status, answer = generate(server, body)
    assert status in (400, 500)
    assert answer["error"]


def test_prompt_that_is_not_utf8_over_http(server: TritonServer) -> None:
    status, answer = generate(server, b'{"text_input": "\xff\xfe"}')
    assert status == 400
    assert "INVALID_ARG: text_input is not UTF-8 at byte 0" in answer["error"]


def test_error_of_our_client(client: LightLLMClient) -> None:
    with pytest.raises(InvalidArgument, match=r"^INVALID_ARG: top_p is 1.5; allowed: 0 < top_p ≤ 1$"):
        client.generate("a", top_p=1.5)


def test_refusals_are_counted(server: TritonServer, client: LightLLMClient) -> None:
    def rejected() -> float:
        return server.metrics()['lightllm_requests_total{status="rejected"}']

    def is_settled() -> bool:
        """What tests before this one have had refused is counted."""
        earlier = rejected()
        time.sleep(1)
        return rejected() == earlier

    assert poll(is_settled)
    before = rejected()
    with pytest.raises(InvalidArgument):
        client.generate("a " * 9000)
    assert poll(lambda: rejected() == before + 1)
