# SPDX-License-Identifier: Apache-2.0
"""Incremental decoding against whole decoding by the libraries themselves, for any ids and any split of them."""

from collections.abc import Callable, Sequence
from pathlib import Path

import msgpack
import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from lightllm_backend.text.incremental_decoding import IncrementalDecoder, WindowDecoder
from lightllm_backend.text.tokenizer import Tokenizer

DATA = Path(__file__).parents[1] / "data"
BYTE_LEVEL = Tokenizer.load(DATA / "byte_level")
BYTE_LEVEL_LIBRARY = tokenizers.Tokenizer.from_file(str(DATA / "byte_level/tokenizer.json"))
LLAMA = Tokenizer.load(DATA / "llama")
LLAMA_SLOW = Tokenizer.load(DATA / "llama", mode="slow")
LLAMA_LIBRARY = tokenizers.Tokenizer.from_file(str(DATA / "llama/tokenizer.json"))
SENTENCEPIECE = sentencepiece.SentencePieceProcessor(model_file=str(DATA / "llama/tokenizer.model"))
FIRST_BYTE = 3  # the id of <0x00>
NUM_TOKENS = 512

# Ids past the vocabulary are those that a model with a padded embedding may draw.
any_ids = st.lists(st.integers(0, NUM_TOKENS + 3), max_size=24)
# Texts that need several tokens a character, with some ids put in at any place.
texts = st.text(
    st.sampled_from("ab \n\u2581é你😀🙂👨👩👧\u200d\u0301\ufe0f🇩🇪\u00a0") | st.characters(exclude_categories=["Cs"]),
    max_size=12,
)
splits = st.lists(st.integers(1, 5), max_size=24)


@st.composite
def spoiled_ids(draw: st.DrawFn, tokenizer: Tokenizer) -> list[int]:
    ids = tokenizer.encode(draw(texts))
    for stray in draw(st.lists(st.integers(0, NUM_TOKENS + 3), max_size=3)):
        ids.insert(draw(st.integers(0, len(ids))), stray)
    if ids and draw(st.booleans()):
        del ids[draw(st.integers(0, len(ids) - 1))]
    return ids


def pushes(ids: Sequence[int], sizes: Sequence[int]) -> list[Sequence[int]]:
    parts, position = [], 0
    for size in sizes:
        parts.append(ids[position : position + size])
        position += size
    return [*parts, ids[position:]]


def join(decoder, parts: Sequence[Sequence[int]]) -> str:
    return "".join([decoder.push(part) for part in parts]) + decoder.flush()


def join_travelling(make: Callable[[], IncrementalDecoder], parts: Sequence[Sequence[int]]) -> str:
    """Each part by a decoder of its own, which has the state of the one before, as it travels."""
    decoder, texts = make(), []
    for part in parts:
        texts.append(decoder.push(part))
        state = msgpack.unpackb(msgpack.packb(decoder.state()))
        decoder = make()
        decoder.restore(state)
    return "".join(texts) + decoder.flush()


@given(any_ids | spoiled_ids(BYTE_LEVEL), splits, st.booleans())
def test_byte_level_is_the_librarys_decoding(ids: list[int], sizes: list[int], skip: bool):
    expected = BYTE_LEVEL_LIBRARY.decode(ids, skip_special_tokens=skip)
    assert BYTE_LEVEL.decode(ids, skip_special_tokens=skip) == expected
    assert join(BYTE_LEVEL.incremental_decoder(skip), pushes(ids, sizes)) == expected
    assert join(BYTE_LEVEL.incremental_decoder(skip), [[token_id] for token_id in ids]) == expected


@given(any_ids | spoiled_ids(LLAMA), splits)
@example([FIRST_BYTE + ord(" "), NUM_TOKENS - 1], [])
def test_byte_fallback_is_sentencepieces_decoding(ids: list[int], sizes: list[int]):
    known = [token_id for token_id in ids if FIRST_BYTE <= token_id < NUM_TOKENS]  # neither special nor unknown
    expected = SENTENCEPIECE.decode(known)
    if known[:1] == [FIRST_BYTE + ord(" ")]:
        expected = expected[1:]  # sentencepiece drops a first space unless it is a byte; the tokenizers library always
    for tokenizer in (LLAMA, LLAMA_SLOW):
        assert tokenizer.decode(ids) == expected
        assert join(tokenizer.incremental_decoder(), pushes(ids, sizes)) == expected
        assert join(tokenizer.incremental_decoder(), [[token_id] for token_id in ids]) == expected


@given(any_ids | spoiled_ids(LLAMA), splits, st.booleans())
def test_byte_fallback_is_transformers_decoding_where_no_run_of_bytes_is_partly_broken(
    ids: list[int], sizes: list[int], skip: bool
):
    # An ordinary token after each byte that is no character ends the run that it would spoil.
    separated = []
    for token_id in ids:
        separated.append(token_id)
        if FIRST_BYTE + 0x80 <= token_id < FIRST_BYTE + 0x100:
            separated.append(NUM_TOKENS - 1)
            separated.insert(-2, NUM_TOKENS - 1)
    expected = LLAMA_LIBRARY.decode(separated, skip_special_tokens=skip)
    assert join(LLAMA.incremental_decoder(skip), pushes(separated, sizes)) == expected
    assert join(LLAMA_SLOW.incremental_decoder(skip), pushes(separated, sizes)) == expected


def test_a_run_of_byte_tokens_keeps_its_whole_characters():
    ids = [FIRST_BYTE + byte for byte in b"\n\xff\xe4\xbd\xa0\xe4\xbd"]
    assert LLAMA.decode(ids) == LLAMA_SLOW.decode(ids) == SENTENCEPIECE.decode(ids) == "\n\ufffd你\ufffd\ufffd"
    decoder = LLAMA.incremental_decoder()
    assert [decoder.push([token_id]) for token_id in ids] == ["\n", "\ufffd", "", "", "你", "", ""]
    assert decoder.flush() == "\ufffd\ufffd"


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, LLAMA, LLAMA_SLOW])
@given(text=texts)
@settings(max_examples=60)
def test_no_push_splits_a_character(tokenizer: Tokenizer, text: str):
    decoder = tokenizer.incremental_decoder()
    released = [decoder.push([token_id]) for token_id in tokenizer.encode(text, parse_special=False)]
    # LLaMA has no spelling of its own for the mark that it writes a space as.
    expected = text if tokenizer is BYTE_LEVEL else text.replace("\u2581", " ")
    assert "".join(released) == expected  # all of it, before the end
    assert decoder.flush() == ""


@pytest.mark.parametrize("tokenizer", [LLAMA, LLAMA_SLOW])
def test_only_the_first_token_loses_its_leading_space(tokenizer: Tokenizer):
    dog = SENTENCEPIECE.encode(" dog")
    spaced = SENTENCEPIECE.encode("the")
    decoder = tokenizer.incremental_decoder()
    assert [decoder.push([1]), decoder.push(spaced), decoder.push(spaced)] == ["", "the", " the"]
    assert tokenizer.decode([*spaced, *dog]) == "the  dog"
    assert tokenizer.decode([1, *spaced], skip_special_tokens=False) == "<s> the"


def test_ids_may_come_as_an_array():
    ids = BYTE_LEVEL.encode("The fox 🙂")
    assert BYTE_LEVEL.decode(np.array(ids, np.int32)) == "The fox 🙂"
    window = WindowDecoder(BYTE_LEVEL_LIBRARY.decode)
    assert join(window, np.array([ids], np.int32)) == "The fox 🙂"


@given(any_ids | spoiled_ids(BYTE_LEVEL), splits)
def test_a_window_decodes_as_the_whole(ids: list[int], sizes: list[int]):
    assert join(WindowDecoder(BYTE_LEVEL_LIBRARY.decode), pushes(ids, sizes)) == BYTE_LEVEL_LIBRARY.decode(ids)


@given(st.lists(st.integers(0, 7), max_size=16), splits)
def test_decoders_without_a_spelling_use_a_window(tmp_path_factory, ids: list[int], sizes: list[int]):
    vocabulary = ["<unk>", "\u2581", "\u2581the", "\u2581fox", "es", "\u2581\u2581", ".", "é"]
    library = tokenizers.Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, "<unk>"))
    library.decoder = decoders.Metaspace()
    directory = tmp_path_factory.getbasetemp() / "metaspace"
    directory.mkdir(exist_ok=True)
    library.save(str(directory / "tokenizer.json"))
    decoder = Tokenizer.load(directory).incremental_decoder()
    assert isinstance(decoder, WindowDecoder)
    assert join(decoder, pushes(ids, sizes)) == library.decode(ids)


@pytest.mark.parametrize(
    "make",
    [BYTE_LEVEL.incremental_decoder, lambda: WindowDecoder(BYTE_LEVEL_LIBRARY.decode), LLAMA.incremental_decoder],
    ids=["byte_level", "window", "byte_fallback"],
)
@given(data=st.data(), sizes=splits)
def test_a_decoder_goes_on_from_the_state_of_another(make, data: st.DataObject, sizes: list[int]):
    ids = data.draw(any_ids | spoiled_ids(LLAMA if make == LLAMA.incremental_decoder else BYTE_LEVEL))
    assert join_travelling(make, pushes(ids, sizes)) == join(make(), [ids])


def test_a_push_decodes_its_own_tokens_only():
    seen: list[int] = []

    def decode(ids: Sequence[int]) -> str:
        seen.append(len(ids))
        return "x" * len(ids)

    window = WindowDecoder(decode)
    assert join(window, [[n] for n in range(1000)]) == "x" * 1000
    assert max(seen) <= 2
