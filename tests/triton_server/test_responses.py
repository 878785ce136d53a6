# SPDX-License-Identifier: Apache-2.0
"""What the steps send each other and clients: what one writes, the next one reads."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import msgpack
import numpy as np
import pytest

from lightllm_backend.messages.ensemble_messages import ChunkMessage, EnsembleContext
from lightllm_backend.messages.seal import Purpose, Seal
from lightllm_backend.options import options_to_plain
from lightllm_backend.request import (
    TOP_LOG_PROB,
    FinishReason,
    PromptLogProbs,
    RequestError,
    RequestOptions,
    SamplingParams,
    TokenChunk,
)
from lightllm_backend.text.response import DecodeState, Response
from lightllm_backend.triton_server import requests, responders, responses
from lightllm_backend.triton_server.requests import read_chunk, read_generation_request, token_id_bytes

TOKENS_SEAL, CHUNK_SEAL = Seal(b"k" * 32, Purpose.TOKENS), Seal(b"k" * 32, Purpose.CHUNK)


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for triton_python_backend_utils, whose responses read like requests."""
    utils = SimpleNamespace(
        Tensor=lambda name, array: SimpleNamespace(name=lambda: name, as_numpy=lambda: array),
        InferenceResponse=lambda output_tensors: SimpleNamespace(inputs=lambda: output_tensors),
        TRITONSERVER_RESPONSE_COMPLETE_FINAL=1,
    )
    monkeypatch.setattr(responses, "pb_utils", utils, raising=False)


@pytest.mark.usefixtures("backend")
def test_logprobs_are_as_vllm_backend_has_them() -> None:
    """src/utils/request.py of vllm_backend (24.12 and newer): a JSON list, per token an object by token id; or null."""
    tokenizer: Any = SimpleNamespace(decode=lambda ids, skip_special_tokens: f"<{ids[0]} {skip_special_tokens}>")

    def logprobs(response: Response) -> Any:
        [tensor] = [one for one in responses.client_response(response, tokenizer).inputs() if one.name() == "logprobs"]
        assert tensor.as_numpy().shape == (1,)
        return json.loads(tensor.as_numpy()[0])

    assert logprobs(Response("ab", "", 3, [7, 2], [], 0.0)) is None
    assert logprobs(Response("ab", "", 3, [7, 2], [-0.5, -2.0], -2.5)) == [
        {"7": {"logprob": -0.5, "rank": None, "decoded_token": "<7 False>"}},
        {"2": {"logprob": -2.0, "rank": None, "decoded_token": "<2 False>"}},
    ]
    likeliest = top_log_probs([(7, -0.5), (9, -1.5)], [(4, -0.25), (5, -1.75)])
    assert logprobs(Response("ab", "", 3, [7, 2], [-0.5, -2.0], -2.5, top_log_probs=likeliest)) == [
        {
            "7": {"logprob": -0.5, "rank": 1, "decoded_token": "<7 False>"},
            "9": {"logprob": -1.5, "rank": 2, "decoded_token": "<9 False>"},
        },
        {
            "2": {"logprob": -2.0, "rank": None, "decoded_token": "<2 False>"},
            "4": {"logprob": -0.25, "rank": 1, "decoded_token": "<4 False>"},
            "5": {"logprob": -1.75, "rank": 2, "decoded_token": "<5 False>"},
        },
    ]


def top_log_probs(*of_tokens: list[tuple[int, float]]) -> bytes:
    return np.array(list(of_tokens), TOP_LOG_PROB).tobytes()


def sending_request(sent: list[Any]) -> Any:
    sender = SimpleNamespace(send=lambda response, flags: sent.append(response))
    return SimpleNamespace(get_response_sender=lambda: sender)


@pytest.mark.usefixtures("backend")
def test_a_chunk_says_all_that_the_detokenizer_must_know() -> None:
    sent: list[Any] = []
    first = DecodeState(stop_words=("x",), prefix="Q: ")
    answers = responders.GenerationResponder.sender(sending_request(sent), RequestOptions(), CHUNK_SEAL)
    responder = responders.GenerationResponder(answers, 0, "u", first, CHUNK_SEAL)
    likeliest = top_log_probs([(1, -0.5)], [(2**31 - 1, -0.1)])
    begun = TokenChunk("u", [7, 2**31 - 1], [-1.0, -0.1], num_prompt_tokens=3, top_log_probs=likeliest)
    ended = TokenChunk("u", [], [], FinishReason.FAILED, 3, error=RequestError("INTERNAL", "broken"))
    responder.send(begun, None, check_client=False)
    responder.send(ended, b"state", check_client=True)
    responder.probe()
    assert {tensor.name() for response in sent for tensor in response.inputs()} == {"sealed_chunk"}
    read = [read_chunk(response, CHUNK_SEAL) for response in sent]
    assert [message.check_client for message in read] == [False, True, True]
    assert {message.uid for message in read} == {"u"}
    assert read[0].chunk == begun
    assert DecodeState.unpack(read[0].state) == DecodeState(stop_words=["x"], eos_ids=[], prefix="Q: ")
    last = read[1].chunk
    assert last is not None
    assert (last.finish_reason, str(last.error), read[1].state) == (FinishReason.FAILED, "INTERNAL: broken", b"state")
    assert read[2].chunk is None


@pytest.mark.usefixtures("backend")
def test_a_direct_caller_of_generation_reads_what_concerns_it() -> None:
    sent: list[Any] = []
    responder = responders.DirectResponder(
        responders.DirectResponder.sender(sending_request(sent), RequestOptions()), 0
    )
    floats, ids = np.array([-0.5, -1.5], np.float32).tobytes(), np.array([3, 4], np.int32).tobytes()
    scores, likeliest = PromptLogProbs(floats, ids, floats), top_log_probs([(1, -0.5), (7, -2.0)])
    chunk = TokenChunk("u", [7], [-2.0], num_prompt_tokens=3, prompt_log_probs=scores, top_log_probs=likeliest)
    responder.send(chunk, b"", check_client=True)
    tensors = {tensor.name(): tensor.as_numpy().tolist() for tensor in sent[0].inputs()}
    assert json.loads(tensors.pop("chunk")[0]) == {
        "uid": "u", "finish_reason": "", "num_input_tokens": 3, "num_cached_tokens": 0, "error": ""
    }  # fmt: skip
    assert tensors == {
        "output_ids": [7], "output_log_probs": [-2.0], "top_token_ids": [1, 7], "top_log_probs": [-0.5, -2.0],
        "prompt_log_probs": [-0.5, -1.5], "prompt_top_token_ids": [3, 4], "prompt_top_log_probs": [-0.5, -1.5],
    }  # fmt: skip


OPTIONS = RequestOptions(SamplingParams(max_tokens=3, seed=4), stream=True)
CONTEXTS = [EnsembleContext(OPTIONS, "", None), EnsembleContext(OPTIONS, "ä", 12.5, ticket=7)]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("context", CONTEXTS)
def test_generation_reads_what_the_tokenizer_sends(context: EnsembleContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(requests, "parse_request")  # the options are parsed once, by the tokenizer
    response = responses.tokens_response([1, 2], context, TOKENS_SEAL)
    request = read_generation_request(response, TOKENS_SEAL)
    assert request == ([1, 2], OPTIONS, context.deadline, context)


@pytest.mark.parametrize("ticket", [-1, 2**62, 1.0, True, "1", None])
def test_a_ticket_that_the_worker_could_not_store_is_an_error(ticket: Any) -> None:
    packed = msgpack.packb((options_to_plain(OPTIONS), "", None, ticket))
    with pytest.raises(ValueError, match=r"ticket is .*; allowed: an integer, 0 ≤ ticket < 2\*\*62"):
        EnsembleContext.unpack(packed)


def request_of(parameters: Any = "", **tensors: Any) -> Any:
    arrays = {name: np.asarray(value) for name, value in tensors.items()}
    return SimpleNamespace(
        inputs=lambda: [SimpleNamespace(name=lambda n=n: n, as_numpy=lambda a=a: a) for n, a in arrays.items()],
        parameters=parameters if callable(parameters) else lambda: parameters,
        timeout=lambda: 0,
    )


def as_bytes(value: bytes) -> Any:
    return np.frombuffer(value, dtype=np.uint8)


SEALED = TOKENS_SEAL.close(CONTEXTS[0].pack(), token_id_bytes([1, 2]))
UNSEALED_REQUESTS = {
    "none": ([1, 2], b""),
    "only the message": ([1, 2], CONTEXTS[0].pack()),
    "another server's": ([1, 2], Seal(b"x" * 32, Purpose.TOKENS).close(CONTEXTS[0].pack(), token_id_bytes([1, 2]))),
    "a chunk's": ([1, 2], CHUNK_SEAL.close(CONTEXTS[0].pack(), token_id_bytes([1, 2]))),
    "other token ids": ([1, 3], SEALED),
    "more token ids": ([1, 2, 3], SEALED),
    "another message": ([1, 2], SEALED[:-1] + bytes([SEALED[-1] ^ 1])),
}


@pytest.mark.parametrize(("token_ids", "sealed"), UNSEALED_REQUESTS.values(), ids=UNSEALED_REQUESTS)
def test_generation_believes_the_tokenizer_of_this_server_alone(token_ids: list[int], sealed: bytes) -> None:
    request = request_of(input_ids=token_ids, ensemble=as_bytes(sealed), sampling_parameters=[b'{"max_tokens": 1}'])
    with pytest.raises(RequestError, match="INVALID_ARG: ensemble does not bear this server's seal; allowed: what the"):
        read_generation_request(request, TOKENS_SEAL)


def test_a_direct_call_of_generation_has_the_public_options_only() -> None:
    request = request_of('{"timeout": 5000000}', input_ids=[1, 2], sampling_parameters=[b'{"max_tokens": 1}'])
    token_ids, options, deadline, context = read_generation_request(request, TOKENS_SEAL)
    assert (token_ids, options.sampling.max_tokens, context) == ((1, 2), 1, None)
    assert deadline is not None
    for option in ("prompt_text", "deadline", "uid"):
        with pytest.raises(RequestError, match=f"INVALID_ARG: {option} is not a parameter"):
            read_generation_request(
                request_of(input_ids=[1], sampling_parameters=[json.dumps({option: 1}).encode()]), TOKENS_SEAL
            )


@pytest.mark.parametrize("sealed", [b"", b"x" * 200, TOKENS_SEAL.close(ChunkMessage("u", None).pack())])
def test_the_detokenizer_believes_generation_of_this_server_alone(sealed: bytes) -> None:
    with pytest.raises(RequestError, match="INVALID_ARG: sealed_chunk does not bear this server's seal; allowed: what"):
        read_chunk(request_of(sealed_chunk=as_bytes(sealed)), CHUNK_SEAL)


def undecodable() -> str:
    return b'{"ab\xff": 1}'.decode()


@pytest.mark.parametrize("read", [requests.read_request, requests.read_deadline])
def test_a_parameter_that_is_not_utf8_is_refused(read: Any) -> None:
    with pytest.raises(RequestError, match="INVALID_ARG: a request parameter is not UTF-8 at byte 4 of .*; allowed"):
        read(request_of(undecodable, text_input=[b"a"]))


@pytest.mark.parametrize(
    ("timeout", "shown"),
    [("true", "true"), ("-1", "-1"), ('"soon"', '"soon"'), ("0.5", "0.5"), ("NaN", "nan"), ("1e999", "inf")],
)
def test_a_timeout_of_another_type_is_refused(timeout: str, shown: str) -> None:
    with pytest.raises(RequestError) as refused:
        requests.read_deadline(request_of(f'{{"timeout": {timeout}}}'))
    assert str(refused.value) == f"INVALID_ARG: timeout is {shown}; allowed: an integer ≥ 0, of microseconds"


def answered(stream: bool) -> tuple[list[Any], list[responders.GenerationResponder]]:
    """What a request with three answers sends, as pairs of a response and whether it is final, and its responders."""
    sent: list[Any] = []
    sender = SimpleNamespace(send=lambda response=None, flags=0: sent.append((response, bool(flags))))
    request = SimpleNamespace(get_response_sender=lambda: sender)
    options = RequestOptions(SamplingParams(n=3), stream=stream)
    answers = responders.GenerationResponder.sender(request, options, CHUNK_SEAL)
    return sent, [
        responders.GenerationResponder(answers, number, f"u/{number}", DecodeState(), CHUNK_SEAL) for number in range(3)
    ]


def last_chunk(number: int, error: RequestError | None = None) -> TokenChunk:
    reason = FinishReason.FAILED if error else FinishReason.STOP
    return TokenChunk(f"u/{number}", [] if error else [number], [], reason, 3, error=error)


@pytest.mark.usefixtures("backend")
def test_answers_that_stream_share_a_sender_and_the_last_end_is_final() -> None:
    sent, each = answered(stream=True)
    for number in (1, 0, 2):
        each[number].send(TokenChunk("u", [number], []), None, check_client=False)
    for number in (1, 0, 2):
        each[number].send(last_chunk(number), b"", check_client=False)
    assert [final for _, final in sent] == [False] * 5 + [True]
    messages = [read_chunk(response, CHUNK_SEAL) for response, _ in sent]
    assert [DecodeState.unpack(message.state).index for message in messages[:3]] == [1, 0, 2]


@pytest.mark.usefixtures("backend")
def test_answers_that_do_not_stream_come_in_one_response() -> None:
    sent, each = answered(stream=False)
    for number in (1, 2, 0):
        each[number].send(last_chunk(number), None, check_client=False)
    [(response, final)] = sent
    messages = read_chunk(response, CHUNK_SEAL).all()
    assert final
    assert [message.chunk and message.chunk.token_ids for message in messages] == [[0], [1], [2]]
    parts = [
        Response("a", "stop", 3, [7, 8], [-1.0, -2.0], -3.0),
        Response("b", "length", 3, [9], [-0.5], -0.5, index=1),
    ]
    tokenizer: Any = SimpleNamespace(decode=lambda ids, skip_special_tokens: "t")
    made = {one.name(): one.as_numpy().tolist() for one in responses.answers_response(parts, tokenizer).inputs()}
    assert (made["text_output"], made["sequence_index"], made["num_output_tokens"]) == ([b"a", b"b"], [0, 1], [2, 1])
    assert (made["output_ids"], made["cumulative_logprob"]) == ([7, 8, 9], [-3.0, -0.5])
    assert (made["num_input_tokens"], len(made["logprobs"])) == ([3], 2)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("stream", [False, True])
def test_an_error_of_one_answer_is_the_only_one(stream: bool) -> None:
    sent, each = answered(stream)
    for number in (1, 2, 0):
        each[number].send(last_chunk(number, RequestError("CANCELLED", "late")), None, check_client=False)
    [response] = [response for response, _ in sent if response is not None]
    error = read_chunk(response, CHUNK_SEAL).chunk.error
    assert error is not None
    assert error.code == "CANCELLED"
    assert [final for _, final in sent][-1]
    assert len(sent) == 1 + stream


@pytest.mark.usefixtures("backend")
def test_kept_tensors_are_the_same_as_new_ones() -> None:
    tokenizer: Any = SimpleNamespace(decode=lambda ids, skip_special_tokens: "t")
    kept = responses.KeptTensors()

    def values(response: Any) -> dict[str, list[Any]]:
        return {tensor.name(): tensor.as_numpy().tolist() for tensor in response.inputs()}

    made = [
        Response("a", "", 3, [7], [], 0.0),
        Response("b", "", 3, [8], [], 0.0),
        Response("c", "stop", 4, [8, 9], [-0.5, -1.0], -1.5),
        Response("", "length", 3, [], [], -1.5),
        *(Response("d", "", count, [1], [], 0.0) for count in range(600)),
    ]
    for response in made:
        again = responses.client_response(response, tokenizer, kept)
        assert values(again) == values(responses.client_response(response, tokenizer))
    first, second = (responses.client_response(made[0], tokenizer, kept).inputs() for _ in range(2))
    shared = {one.name() for one, other in zip(first, second, strict=True) if one is other}
    assert shared == set(responses.PUBLIC_OUTPUTS) - {"text_output", "output_ids"}
    assert len(kept._common) <= 512
