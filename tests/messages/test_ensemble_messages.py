# SPDX-License-Identifier: Apache-2.0
"""The messages between the steps: what goes in comes out, and everything else is a ValueError."""

from __future__ import annotations

import math
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightllm_backend.messages.ensemble_messages import ChunkMessage, EnsembleContext
from lightllm_backend.options import options_from_plain, options_to_plain
from lightllm_backend.request import (
    FinishReason,
    PromptLogProbs,
    RequestError,
    RequestOptions,
    SamplingParams,
    TokenChunk,
)
from lightllm_backend.text.response import DecodeState
from lightllm_backend.text.text_stream import TextState

SAMPLING = SamplingParams(
    max_tokens=7, do_sample=True, temperature=0.3, top_p=0.9, top_k=5, presence_penalty=0.1, frequency_penalty=0.2,
    repetition_penalty=1.2, seed=2**64 - 1, min_tokens=3, ignore_eos=True, stop_words=("é", "\n\n"),
    stop_token_ids=(5, 0), return_log_probs=True,
)  # fmt: skip
OPTIONS = RequestOptions(SAMPLING, True, False, False, False)


@pytest.mark.parametrize("options", [OPTIONS, RequestOptions()])
def test_a_context_survives(options: RequestOptions) -> None:
    context = EnsembleContext(options, "Ä prompt", 12.25)
    assert EnsembleContext.unpack(context.pack()) == context


CHUNKS = [
    TokenChunk("u", [1, 2**31 - 1], [-0.5, -math.inf], None, 3),
    TokenChunk("u", [1], [], prompt_log_probs=PromptLogProbs(b"1234", b"12345678", b"87654321")),
    TokenChunk("u", [], [], FinishReason.FAILED, 0, error=RequestError("INTERNAL", "ä: broken")),
    None,
]


@pytest.mark.parametrize("chunk", CHUNKS)
def test_a_chunk_survives(chunk: TokenChunk | None) -> None:
    message = ChunkMessage("u", chunk, b"state" if chunk else b"", True)
    assert repr(ChunkMessage.unpack(message.pack())) == repr(message)  # errors are equal to themselves alone


def test_an_error_that_utf8_cannot_spell_is_told_all_the_same() -> None:
    chunk = TokenChunk("u", [], [], FinishReason.FAILED, error=RequestError("INTERNAL", "KeyError('\ud800')"))
    arrived = ChunkMessage.unpack(ChunkMessage("u", chunk).pack()).chunk
    assert str(arrived and arrived.error) == "INTERNAL: KeyError('?')"


STATE = DecodeState(
    ["stop"], 2, False, [2], "prefix", TextState([b"\xc3", True], 5, False, "\ud800"), [1, 2], [-0.5], 9, -1.5
)


@pytest.mark.parametrize("state", [STATE, DecodeState([], eos_ids=[])])
def test_a_decoding_state_survives(state: DecodeState) -> None:
    assert DecodeState.unpack(state.pack()) == state


def changed(values: list[Any], position: int, value: Any) -> bytes:
    packed: bytes = msgpack.packb([*values[:position], value, *values[position + 1 :]], unicode_errors="surrogatepass")
    return packed


WRONG_OPTIONS = [
    ("max_tokens", 0), ("prompt_logprobs", 21),
    ("max_tokens", 1.0), ("max_tokens", True), ("temperature", -0.5), ("temperature", math.nan),
    ("temperature", 1), ("top_p", 0.0), ("top_k", -2), ("presence_penalty", math.inf), ("repetition_penalty", 0.0),
    ("seed", -1), ("seed", "7"), ("min_tokens", 8), ("ignore_eos", 1), ("stop_words", "x"), ("stop_words", [7]),
    ("logit_bias", [5, 1.0]), ("logit_bias", [[5, 101.0]]), ("logit_bias", [[5, 1.0, 1.0]]),
    ("logit_bias", [[5.0, 1.0]]), ("logit_bias", [[5, 1.0], [5, 2.0]]), ("min_p", -0.5), ("top_logprobs", 21),
    ("stop_words", ["x"] * 33), ("stop_token_ids", [0] * 33), ("stop_token_ids", [0.5]), ("stop_token_ids", None),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), WRONG_OPTIONS)
def test_options_are_what_they_can_be(name: str, value: Any) -> None:
    values = options_to_plain(OPTIONS)
    values[list(SamplingParams.__dataclass_fields__).index(name)] = value
    with pytest.raises(ValueError, match=f"{name} is|, {name} 8|the seed is -1"):
        options_from_plain(values)


@pytest.mark.parametrize("values", [None, [], {}, options_to_plain(OPTIONS)[1:], [*options_to_plain(OPTIONS), 1]])
def test_options_that_are_too_few_or_too_many(values: Any) -> None:
    with pytest.raises(ValueError, match="these are not the values of a request's options"):
        options_from_plain(values)


@pytest.mark.parametrize(
    "packed",
    [
        (options_to_plain(OPTIONS), 7, None),
        (options_to_plain(OPTIONS), "", 7),
        (options_to_plain(OPTIONS), "", math.nan),
        (options_to_plain(OPTIONS), ""),
        7,
    ],
)
def test_what_is_no_context(packed: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        EnsembleContext.unpack(msgpack.packb(packed))


CHUNK_VALUES = msgpack.unpackb(ChunkMessage("u", CHUNKS[0], b"state").pack())
WRONG_CHUNKS = [
    (0, 7), (1, [-1]), (1, [2**31]), (1, [1.0]), (1, [True]), (1, "ids"), (2, [-0.5]), (2, [1, 2]), (3, "weary"),
    (4, -1), (4, 1.5), (5, None), (7, "state"), (8, 1), (9, None), (11, b"12345678"), (11, []),
    (6, [b"1234"]), (6, [b"123", b"", b""]), (6, [b"1234", b"1234", b""]), (6, [1, 2, 3]), (10, [7]), (10, b""),
    (12, -1), (12, 10**6),
]  # fmt: skip


@pytest.mark.parametrize(("position", "value"), WRONG_CHUNKS)
def test_what_is_no_chunk(position: int, value: Any) -> None:
    with pytest.raises(ValueError, match=r"."):
        ChunkMessage.unpack(changed(CHUNK_VALUES, position, value))


STATE_VALUES = msgpack.unpackb(STATE.pack(), unicode_errors="surrogatepass")
WRONG_STATES = [
    (0, [7]), (0, "stop"), (1, 1.0), (2, 1), (3, ["2"]), (4, None), (5, [[], 5, False]), (5, [None, 5, False, ""]),
    (5, "text"), (6, [0.5]), (7, [1]), (8, "9"), (9, 0), (10, 0.5), (11, ""),
]  # fmt: skip


@pytest.mark.parametrize(("position", "value"), WRONG_STATES)
def test_what_is_no_decoding_state(position: int, value: Any) -> None:
    with pytest.raises(ValueError, match=r"."):
        DecodeState.unpack(changed(STATE_VALUES, position, value))


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=4)
    | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
CONTEXT_VALUES = msgpack.unpackb(EnsembleContext(OPTIONS, "prompt", 1.0).pack())
spoiled = st.one_of(
    [
        st.tuples(st.just(values), st.integers(0, len(values) - 1), plain).map(lambda drawn: changed(*drawn))
        for values in (CONTEXT_VALUES, CHUNK_VALUES, STATE_VALUES)
    ]
)


@given(st.binary(max_size=40) | plain.map(msgpack.packb) | spoiled)
@settings(max_examples=500, derandomize=True)
def test_any_bytes_are_a_message_or_an_error(packed: bytes) -> None:
    """Only our own steps can seal them; still nothing but an Exception may come of any."""
    for message in (EnsembleContext, ChunkMessage, DecodeState):
        try:
            unpacked = message.unpack(packed)
        except (ValueError, TypeError, msgpack.UnpackException):
            continue
        assert message.unpack(unpacked.pack()).pack() == unpacked.pack()
