# SPDX-License-Identifier: Apache-2.0
"""TextStream: what is released when, and where it stops."""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from lightllm_backend.text.incremental_decoding import IncrementalDecoder, WindowDecoder
from lightllm_backend.text.response import DecodeState
from lightllm_backend.text.text_stream import TextStream
from lightllm_backend.text.tokenizer import Tokenizer

DATA = Path(__file__).parents[1] / "data"
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


# Stop strings that spell special tokens


class Windowed(Tokenizer):
    """The byte-level tokenizer with a window instead of a spelling, as tokenizers of other kinds have it."""

    def __init__(self) -> None:
        self._inner = tokenizers.Tokenizer.from_file(str(DATA / "byte_level/tokenizer.json"))
        self.vocab_size = 512
        self._set_special({0: "<unk>", 1: "<s>", 2: "</s>", 3: "<pad>"})

    def _encode(self, text: str, parse_special: bool, add_special_tokens: bool) -> list[int]:
        return BYTE_LEVEL.encode(text, parse_special, add_special_tokens)

    def token(self, token_id: int) -> str:
        return BYTE_LEVEL.token(token_id)

    def _decoder(self, skip_special_tokens: bool) -> IncrementalDecoder:
        return WindowDecoder(lambda ids: self._inner.decode(ids, skip_special_tokens=skip_special_tokens))


SPECIAL = [1, 2, 3]
special_kinds = pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, LLAMA, Windowed()], ids=["bytes", "llama", "window"])


def ids_inside(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text as they are inside of another, without BOS, a space before it, or special tokens."""
    line_end = len(tokenizer.encode("\n", parse_special=False))
    ids = tokenizer.encode("\n" + text, parse_special=False)[line_end:]
    assert tokenizer.decode(ids) == text
    return ids


def stopped_text(tokenizer: Tokenizer, ids: Sequence[int], stop_words: Sequence[str], **options) -> tuple[str, int]:
    """One token a push, each stream from the state of the one before; the text, and how many tokens were taken."""
    stream = TextStream(tokenizer, stop_words, **options)
    text = ""
    for token_id in ids:
        text += stream.push([token_id])
        state = DecodeState.unpack(DecodeState(text=stream.state()).pack()).text  # as it travels
        assert state == stream.state()
        stream = TextStream(tokenizer, stop_words, **options)
        stream.restore(state)
    whole = TextStream(tokenizer, stop_words, **options)
    assert whole.push(ids) + whole.flush() == text + stream.flush()
    assert (whole.stopped, whole.num_tokens) == (stream.stopped, stream.num_tokens)
    return text, stream.num_tokens if stream.stopped else -1


@special_kinds
def test_a_stop_string_that_is_a_special_token_stops_though_it_is_no_text(tokenizer: Tokenizer):
    dog = ids_inside(tokenizer, "dog")
    for stop_words in (["</s>"], ["never", "</s>"], ["g</s>x", "</s>"]):
        assert stopped_text(tokenizer, [*dog, 2, *dog], stop_words) == ("dog", len(dog) + 1)
        assert stopped_text(tokenizer, [*dog, 2, *dog], stop_words, skip_special_tokens=False) == ("dog", len(dog) + 1)
    assert stopped_text(tokenizer, [2, *dog], ["</s>"]) == ("", 1)


@special_kinds
def test_text_before_and_after_the_special_token_belongs_to_the_stop_string(tokenizer: Tokenizer):
    dog, end = (ids_inside(tokenizer, text) for text in ("a dog", "end"))
    assert stopped_text(tokenizer, [*dog, 2, *end], ["dog</s>"]) == ("a ", len(dog) + 1)
    assert stopped_text(tokenizer, [*dog, 2, *end], ["dog</s>en"])[0] == "a "
    assert stopped_text(tokenizer, [*dog, 2, 1, *end], ["g</s><s>end"]) == ("a do", len(dog) + len(end) + 2)
    # The first to be complete wins; of two that the same token completes, the one that starts first.
    assert stopped_text(tokenizer, [*dog, 2], ["</s>", "og</s>"]) == ("a d", len(dog) + 1)
    # Not where something else stands between, or the order is another.
    assert stopped_text(tokenizer, [2, *dog], ["dog</s>"])[1] == -1
    assert stopped_text(tokenizer, [*dog, *end, 2], ["dog</s>"])[1] == -1


@special_kinds
def test_text_is_not_held_longer_than_a_special_token_may_still_come(tokenizer: Tokenizer):
    stream = TextStream(tokenizer, ["b</s>c"])
    a, b, c, x = (ids_inside(tokenizer, letter)[0] for letter in "abcx")
    assert [stream.push([token_id]) for token_id in (a, b, 2, x, b, x)][-5:] == ["", "", "bx", "", "bx"]
    assert stream.push([b, 2, b, 2, c]) == "b"  # the first of the two is text
    assert stream.stopped


@special_kinds
def test_min_tokens_hold_for_special_tokens_too(tokenizer: Tokenizer):
    dog = ids_inside(tokenizer, "dog")
    ids = [*dog, 2, *dog, 2]
    assert stopped_text(tokenizer, ids, ["</s>"], min_tokens=len(dog) + 1)[1] == len(ids)
    assert stopped_text(tokenizer, ids, ["</s>"], min_tokens=len(dog))[1] == len(dog) + 1
    assert stopped_text(tokenizer, ids, ["</s>"], min_tokens=len(ids))[1] == -1


@special_kinds
def test_other_stop_strings_see_text_without_special_tokens(tokenizer: Tokenizer):
    a, b = (ids_inside(tokenizer, letter)[0] for letter in "ab")
    assert stopped_text(tokenizer, [a, 1, b], ["ab"])[1] == 3
    assert stopped_text(tokenizer, [a, 1, b], ["ab", "<s></s>"])[1] == 3
    assert stopped_text(tokenizer, [a, 1, b], ["ab", "<s>"])[1] == 2
    # The spelling as text of ordinary tokens is text.
    spelled = ids_inside(tokenizer, "x</s>")
    assert stopped_text(tokenizer, spelled, ["</s>"]) == ("x", len(spelled))


def marked_text(tokenizer: Tokenizer, ids: Sequence[int], named: str) -> list[str]:
    """What stop strings that spell special tokens are looked for in, after each number of tokens."""
    decoder = tokenizer.incremental_decoder()
    texts = [""]
    for token_id in ids:
        mark = tokenizer.token(token_id) if token_id in SPECIAL and tokenizer.token(token_id) in named else ""
        texts.append(texts[-1] + decoder.push([token_id]) + mark.replace("<", "\x01").replace(">", "\x02"))
    return texts


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, LLAMA], ids=["bytes", "llama"])
@given(data=st.data(), min_tokens=st.integers(0, 4))
def test_stop_strings_with_special_tokens_are_found_as_in_the_text_with_them(tokenizer, data, min_tokens):
    letters = [ids_inside(tokenizer, letter)[0] for letter in "ab"]
    ids = data.draw(st.lists(st.sampled_from([*letters, 2, 1]), max_size=10))
    word = data.draw(st.lists(st.sampled_from(["a", "b", "</s>", "<s>"]), min_size=1, max_size=3).map("".join))
    marked_word = word.replace("<", "\x01").replace(">", "\x02")
    texts = marked_text(tokenizer, ids, word)
    expected: tuple[str, int] = (tokenizer.decode(ids), -1)
    for count in range(min_tokens + 1, len(ids) + 1):
        position = texts[count].find(marked_word, max(0, len(texts[count - 1]) - len(marked_word) + 1))
        if position >= 0 and len(texts[count]) > len(texts[count - 1]):
            before = re.sub("\x01[^\x02]*\x02", "", texts[count][:position])
            expected = (before, count)
            break
    text, count = stopped_text(tokenizer, ids, [word], min_tokens=min_tokens)
    stream = TextStream(tokenizer, [word], min_tokens)
    assert (stream.push(ids) + stream.flush(), count) == expected
    assert expected[0].startswith(text)


def test_without_special_tokens_in_stop_strings_nothing_is_marked():
    assert TextStream(BYTE_LEVEL, ["dog", "s>"])._marks == {}
    assert TextStream(BYTE_LEVEL, ["dog", "<s>"])._marks.keys() == {1}
