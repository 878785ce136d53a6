# SPDX-License-Identifier: Apache-2.0
"""What the steps send each other and clients: what one writes, the next one reads."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from lightllm_backend.messages.ensemble_messages import EnsembleContext
from lightllm_backend.request import FinishReason, RequestError, RequestOptions, SamplingParams, TokenChunk
from lightllm_backend.text.response import DecodeState, Response
from lightllm_backend.triton_server import responses
from lightllm_backend.triton_server.requests import read_chunk, read_generation_request


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


@pytest.mark.usefixtures("backend")
def test_a_chunk_says_all_that_the_detokenizer_must_know() -> None:
    sent: list[Any] = []
    sender = SimpleNamespace(send=lambda response, flags: sent.append(response))
    request = SimpleNamespace(get_response_sender=lambda: sender)
    first = DecodeState(stop_words=("x",), prefix="Q: ")
    responder = responses.GenerationResponder(request, "u", first, "/returns", in_ensemble=True)
    begun = TokenChunk("u", [7], [-1.0], num_prompt_tokens=3)
    ended = TokenChunk("u", [], [], FinishReason.FAILED, 3, error=RequestError("INTERNAL", "broken"))
    responder.send(begun, None, check_client=False)
    responder.send(ended, "[[1]]", check_client=True)
    responder.probe()
    read = [read_chunk(response) for response in sent]
    assert [chunk and chunk.token_ids for chunk, _ in read] == [[7], [], None]
    assert [details.check_client for _, details in read] == [False, True, True]
    assert {(details.uid, details.return_address) for _, details in read} == {("u", "/returns")}
    assert read[0][0] == begun
    assert DecodeState.from_json(read[0][1].state) == DecodeState(stop_words=["x"], eos_ids=[], prefix="Q: ")
    assert read[1][0] is not None
    assert (read[1][0].finish_reason, str(read[1][0].error)) == (FinishReason.FAILED, "INTERNAL: broken")
    assert read[1][1].state == "[[1]]"


@pytest.mark.usefixtures("backend")
def test_a_direct_caller_of_generation_reads_what_concerns_it() -> None:
    sent: list[Any] = []
    request = SimpleNamespace(
        get_response_sender=lambda: SimpleNamespace(send=lambda response, flags: sent.append(response))
    )
    responder = responses.GenerationResponder(request, "u", DecodeState(), "", in_ensemble=False)
    responder.send(TokenChunk("u", [7], [], num_prompt_tokens=3), "[]", check_client=True)
    [tensor] = [one for one in sent[0].inputs() if one.name() == "chunk"]
    assert json.loads(tensor.as_numpy()[0]) == {"uid": "u", "finish_reason": "", "num_input_tokens": 3, "error": ""}


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("context", [EnsembleContext("", None), EnsembleContext("ä", 12.5)])
def test_generation_reads_what_the_tokenizer_sends(context: EnsembleContext) -> None:
    options = RequestOptions(SamplingParams(max_tokens=3, seed=4), stream=True)
    response = responses.tokens_response([1, 2], options.to_json(), context)
    parsed, arrived = read_generation_request(response)
    assert (parsed.token_ids, parsed.options, arrived) == ((1, 2), options, context)


@pytest.mark.parametrize("ticket", [-1, 2**62, 1.0, True, "1", None])
def test_a_ticket_that_the_worker_could_not_store_is_an_error(ticket: Any) -> None:
    text = json.dumps({"prompt_text": "", "deadline": None, "ticket": ticket})
    with pytest.raises(ValueError, match=r"ticket is .*; allowed: an integer, 0 ≤ ticket < 2\*\*62"):
        EnsembleContext.from_json(text)
