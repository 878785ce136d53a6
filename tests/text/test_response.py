# SPDX-License-Identifier: Apache-2.0
"""ResponseDecoder: from token chunks to what a client reads, with a tokenizer of one token a byte."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lightllm_backend.request import TOP_LOG_PROB, FinishReason, RequestOptions, SamplingParams, TokenChunk
from lightllm_backend.text.response import DecodeState, Response, ResponseDecoder
from lightllm_backend.text.text_stream import TextStream
from lightllm_backend.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(Path(__file__).parents[1] / "data" / "byte_level")


class Client:
    """One request: feeds text as tokens and keeps the responses. With `travels` each chunk has a decoder of its own."""

    def __init__(self, tokenizer: Tokenizer, state: DecodeState, travels: bool) -> None:
        self._tokenizer = tokenizer
        self._travels = travels
        self.decoder = ResponseDecoder(tokenizer, state)

    def ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, parse_special=False)

    def push(
        self, ids: list[int], reason: FinishReason | None = None, log_probs: list[float] | None = None
    ) -> Response | None:
        if self._travels:
            packed = self.decoder.state().pack()
            self.decoder = ResponseDecoder(self._tokenizer, DecodeState.unpack(packed))
        top_log_probs = np.array(list(zip(ids, log_probs or [], strict=False)), TOP_LOG_PROB).tobytes()
        chunk = TokenChunk("u", ids, log_probs or [], reason, num_prompt_tokens=3, top_log_probs=top_log_probs)
        return self.decoder.decode(chunk)


ClientOf = Callable[[DecodeState], Client]


@pytest.fixture(params=[False, True], ids=["stays", "travels"])
def client_of(tokenizer: Tokenizer, request: pytest.FixtureRequest) -> ClientOf:
    return lambda state: Client(tokenizer, state, request.param)


def final(response: Response | None) -> Response:
    assert response is not None
    return response


def test_each_response_has_what_is_new(client_of: ClientOf) -> None:
    client = client_of(DecodeState())
    first, second = client.ids("ab"), client.ids("c")
    assert client.push(first) == Response("ab", "", 3, first, [], 0.0)
    assert client.push(second, FinishReason.LENGTH) == Response("c", "length", 3, second, [], 0.0)


@pytest.mark.parametrize("reason", [FinishReason.STOP, FinishReason.LENGTH, FinishReason.CANCELLED])
def test_the_last_chunk_gives_a_response_even_without_tokens(client_of: ClientOf, reason: FinishReason) -> None:
    response = final(client_of(DecodeState()).push([], reason))
    assert (response.text_output, response.finish_reason, response.output_ids) == ("", reason.value, [])


def test_a_cut_character_is_held_back_with_its_tokens(client_of: ClientOf) -> None:
    client = client_of(DecodeState())
    ids = client.ids("🎉")
    assert len(ids) > 1, "the tokenizer must cut it for this test"
    for token_id in ids[:-1]:
        assert client.push([token_id]) is None
    assert final(client.push(ids[-1:])) == Response("🎉", "", 3, ids, [], 0.0)


def test_what_is_held_comes_out_at_the_end(client_of: ClientOf) -> None:
    client = client_of(DecodeState())
    begun = client.ids("🎉")[:-1]
    assert client.push(begun) is None
    response = final(client.push([], FinishReason.LENGTH))
    assert set(response.text_output) == {"\ufffd"}
    assert response.output_ids == begun


def test_the_start_of_a_stop_string_is_held_and_given_out_if_it_was_none(client_of: ClientOf) -> None:
    client = client_of(DecodeState(stop_words=("END",)))
    assert final(client.push(client.ids("xE"))).text_output == "x"
    assert client.push(client.ids("N")) is None
    assert final(client.push(client.ids("Q"))).text_output == "ENQ"


def test_a_stop_string_and_what_follows_it_are_no_text(client_of: ClientOf) -> None:
    client = client_of(DecodeState(stop_words=("END",)))
    assert final(client.push(client.ids("one E"))).text_output == "one "
    ids = client.ids("ND")
    response = final(client.push(ids, FinishReason.STOP))
    assert (response.text_output, response.finish_reason) == ("", "stop")
    assert response.output_ids == ids


def test_min_tokens_keeps_an_early_stop_string(client_of: ClientOf) -> None:
    client = client_of(DecodeState(stop_words=("a",), min_tokens=2))
    assert final(client.push(client.ids("a"))).text_output == "a"


def test_an_eos_that_ends_is_no_text_but_is_counted(tokenizer: Tokenizer, client_of: ClientOf) -> None:
    [ordinary] = tokenizer.encode("z", parse_special=False)
    ends = client_of(DecodeState(eos_ids=(ordinary,)))
    response = final(ends.push([*ends.ids("a"), ordinary], FinishReason.STOP))
    assert (response.text_output, response.output_ids[-1]) == ("a", ordinary)
    # The same token in the middle, or last by length, is what it is.
    goes_on = client_of(DecodeState(eos_ids=(ordinary,)))
    assert final(goes_on.push([ordinary, *goes_on.ids("a")], FinishReason.LENGTH)).text_output == "za"
    assert final(client_of(DecodeState(eos_ids=(ordinary,))).push([ordinary], FinishReason.LENGTH)) == (
        Response("z", "length", 3, [ordinary], [], 0.0)
    )


def test_the_prompt_comes_once_before_the_first_text(client_of: ClientOf) -> None:
    client = client_of(DecodeState(prefix="Q: "))
    assert final(client.push(client.ids("a"))).text_output == "Q: a"
    assert final(client.push(client.ids("b"), FinishReason.LENGTH)).text_output == "b"
    assert final(client_of(DecodeState(prefix="Q")).push([], FinishReason.CANCELLED)).text_output == "Q"


def test_log_probs_are_of_the_response_and_their_sum_of_all_so_far(client_of: ClientOf) -> None:
    client = client_of(DecodeState())
    ids = client.ids("é")
    assert len(ids) == 2, "the tokenizer must cut it for this test"
    assert client.push(ids[:1], log_probs=[-0.5]) is None
    first = final(client.push(ids[1:], log_probs=[-0.25]))
    assert (first.output_log_probs, first.cumulative_logprob) == ([-0.5, -0.25], -0.75)
    assert np.frombuffer(first.top_log_probs, TOP_LOG_PROB).tolist() == [(ids[0], -0.5), (ids[1], -0.25)]
    last = final(client.push(client.ids("a"), FinishReason.LENGTH, [-1.0]))
    assert (last.output_log_probs, last.cumulative_logprob) == ([-1.0], -1.75)
    assert np.frombuffer(last.top_log_probs, TOP_LOG_PROB)["log_prob"].tolist() == [-1.0]


def test_flush_gives_what_an_error_would_lose_once(client_of: ClientOf) -> None:
    client = client_of(DecodeState(stop_words=("END",)))
    assert client.decoder.flush() is None
    client = client_of(DecodeState(stop_words=("END",)))
    ids = client.ids("EN")
    assert client.push(ids) is None
    assert client.decoder.flush() == Response("EN", "", 3, ids, [], 0.0)
    assert client.decoder.flush() is None


def test_the_context_of_options(tokenizer: Tokenizer) -> None:
    sampling = SamplingParams(stop_words=("x",), min_tokens=2)
    options = RequestOptions(sampling, skip_special_tokens=False, exclude_input_in_output=False)
    text = TextStream.of(tokenizer, options, [5])
    state = DecodeState.of(options, (2, 3), "prompt", text)
    assert state == DecodeState(("x",), 2, False, (2, 3), "prompt", text.state())
    ignoring = RequestOptions(SamplingParams(ignore_eos=True))
    text = TextStream.of(tokenizer, ignoring, [5])
    assert DecodeState.of(ignoring, (2,), "prompt", text) == DecodeState(text=text.state())


@pytest.mark.parametrize("skip", [True, False])
def test_an_eos_that_ends_may_complete_a_stop_string(client_of: ClientOf, tokenizer: Tokenizer, skip: bool) -> None:
    [eos] = tokenizer.encode("</s>")
    client = client_of(DecodeState(stop_words=("dog</s>",), skip_special_tokens=skip, eos_ids=(eos,)))
    ids = client.ids("a dog")
    assert final(client.push(ids)).text_output == "a "
    response = final(client.push([eos], FinishReason.STOP))
    assert (response.text_output, response.output_ids[-1]) == ("", eos)
    # Where it completes none, what was held comes out.
    client = client_of(DecodeState(stop_words=("dogs</s>",), skip_special_tokens=skip, eos_ids=(eos,)))
    assert final(client.push([*ids, eos], FinishReason.STOP)).text_output == "a dog"
