# SPDX-License-Identifier: Apache-2.0
"""TextStream: what is released when, and where it stops."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightllm_backend.text import TextStream, Tokenizer

DATA = Path(__file__).parent / "data"
BYTE_LEVEL = Tokenizer.load(DATA / "byte_level")
LLAMA = Tokenizer.load(DATA / "llama")
TOKENIZERS = [BYTE_LEVEL, LLAMA]


def texts_by_token(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The text that is certain after each number of tokens, from none to all; the last one with the flush."""
    stream = TextStream(tokenizer)
    texts = list(itertools.accumulate([stream.push([token_id]) for token_id in ids], initial=""))
    texts[-1] += stream.flush()
    return texts


def expected_stop(texts: list[str], stop_words: Sequence[str], min_tokens: int) -> tuple[str, int] | None:
    """The text before the stop string, and the number of tokens up to and with the one that completes it."""
    for count in range(min_tokens + 1, len(texts)):
        old, text = texts[count - 1], texts[count]
        starts = [
            end - len(word)
            for word in stop_words
            for end in range(len(old) + 1, len(text) + 1)
            if word and text[:end].endswith(word)
        ]
        if starts:
            return text[: min(starts)], count
    return None


def expected_release(text: str, stop_words: Sequence[str]) -> str:
    """What may be released of a text that goes on."""
    held = [size for word in stop_words for size in range(1, len(word)) if text.endswith(word[:size])]
    return text[: len(text) - max(held, default=0)]


few_letters = st.text("abAB \n🙂é", max_size=14)
stops = st.lists(st.text("abAB \n🙂é\ufffd", max_size=4), max_size=3)
ids_of = {
    tokenizer: few_letters.map(lambda text, t=tokenizer: t.encode(text, parse_special=False))
    | st.lists(st.integers(0, 515), max_size=14)
    | st.lists(st.sampled_from(tokenizer.encode("abAB 🙂é", parse_special=False)), max_size=14)
    for tokenizer in TOKENIZERS
}


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["byte_level", "llama"])
@given(data=st.data(), stop_words=stops, min_tokens=st.integers(0, 6), sizes=st.lists(st.integers(0, 5), max_size=14))
@settings(max_examples=300)
def test_text_is_cut_at_the_first_stop_string_whatever_the_split(tokenizer, data, stop_words, min_tokens, sizes):
    ids = data.draw(ids_of[tokenizer])
    texts = texts_by_token(tokenizer, ids)
    stop = expected_stop(texts, stop_words, min_tokens)
    stream = TextStream(tokenizer, stop_words, min_tokens)
    released, position = "", 0
    travels = data.draw(st.booleans())
    for size in [*sizes, len(ids)]:
        if travels:
            state = stream.state()
            stream = TextStream(tokenizer, stop_words, min_tokens)
            stream.restore(state)
        released += stream.push(ids[position : position + size])
        position = min(position + size, len(ids))
        if not stream.stopped and position < len(ids):
            assert stream.num_tokens == position
            assert released == expected_release(texts[position], stop_words)
    released += stream.flush()
    assert stream.stopped == (stop is not None)
    assert (released, stream.num_tokens) == (stop or (texts[-1], len(ids)))


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["byte_level", "llama"])
@given(data=st.data(), skip=st.booleans())
def test_without_stop_strings_the_text_is_the_decoded_ids(tokenizer, data, skip):
    ids = data.draw(ids_of[tokenizer])
    stream = TextStream(tokenizer, skip_special_tokens=skip)
    text = "".join([stream.push([token_id]) for token_id in ids]) + stream.flush()
    assert text == tokenizer.decode(ids, skip_special_tokens=skip)
    assert (stream.stopped, stream.num_tokens) == (False, len(ids))


def one_by_one(stream: TextStream, text: str) -> list[str]:
    """Push a text of ASCII characters with one token for each."""
    return [stream.push(BYTE_LEVEL.encode(character)) for character in text]


def test_text_is_held_only_while_a_stop_string_may_have_begun():
    stream = TextStream(BYTE_LEVEL, ["stop"])
    assert one_by_one(stream, "a sto st") == ["a", " ", "", "", "", "sto ", "", ""]
    assert stream.flush() == "st"
    assert not stream.stopped


def test_after_a_stop_string_nothing_comes():
    stream = TextStream(BYTE_LEVEL, ["stop"])
    assert one_by_one(stream, "a stop!") == ["a", " ", "", "", "", "", ""]
    assert (stream.stopped, stream.num_tokens) == (True, 6)
    assert stream.flush() == ""


def test_a_stop_string_inside_one_token_cuts_it():
    tokens = BYTE_LEVEL.encode(" the")
    assert len(tokens) == 1
    stream = TextStream(BYTE_LEVEL, ["h"])
    assert stream.push([*tokens, *tokens]) == " t"
    assert (stream.stopped, stream.num_tokens) == (True, 1)


def test_the_stop_string_that_is_complete_first_wins():
    stream = TextStream(BYTE_LEVEL, ["abcd", "bc"])
    assert "".join(one_by_one(stream, "abcd")) == "a"
    assert stream.num_tokens == 3


def test_of_two_complete_with_the_same_token_the_earlier_start_wins():
    stream = TextStream(BYTE_LEVEL, ["bc", "abc"])
    assert "".join(one_by_one(stream, "xabc")) == "x"


def test_a_stop_string_within_min_tokens_is_text():
    stream = TextStream(BYTE_LEVEL, ["ab"], min_tokens=2)
    assert one_by_one(stream, "abab") == ["", "ab", "", ""]
    assert (stream.stopped, stream.num_tokens) == (True, 4)
    assert stream.flush() == ""


def test_a_stop_string_may_begin_within_min_tokens():
    stream = TextStream(BYTE_LEVEL, ["aa"], min_tokens=2)
    assert one_by_one(stream, "aaa") == ["", "a", ""]
    assert (stream.stopped, stream.num_tokens) == (True, 3)


def test_a_stop_string_within_min_tokens_does_not_count_later():
    stream = TextStream(BYTE_LEVEL, ["abcd", "bc"], min_tokens=3)
    assert one_by_one(stream, "abcx") == ["", "", "", "abcx"]
    assert not stream.stopped


def test_llamas_newline_stops_at_once():
    newline = LLAMA.encode("\n", parse_special=False)[-1]
    stream = TextStream(LLAMA, ["\n"])
    assert stream.push(LLAMA.encode("a dog", parse_special=False)) == "a dog"
    assert stream.push([newline]) == ""
    assert stream.stopped


def test_a_broken_character_at_the_end_may_complete_a_stop_string():
    first_byte_of_a_character = BYTE_LEVEL.encode("🙂")[0]
    stream = TextStream(BYTE_LEVEL, ["\ufffd"])
    assert stream.push([*BYTE_LEVEL.encode("a"), first_byte_of_a_character]) == "a"
    assert not stream.stopped
    assert stream.flush() == ""
    assert stream.stopped
