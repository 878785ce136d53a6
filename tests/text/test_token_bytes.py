# SPDX-License-Identifier: Apache-2.0
"""A text never has fewer tokens than its bytes say, and where that cannot be proved nothing is said."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers

from lightllm_backend.text.token_bytes import NFC_SHRINKS, token_bytes
from lightllm_backend.text.tokenizer import Tokenizer

DATA = Path(__file__).parents[1] / "data"
FAST, SLOW = Tokenizer.load(DATA / "llama"), Tokenizer.load(DATA / "llama", mode="slow")
TOKENIZERS, IDS = [FAST, SLOW, Tokenizer.load(DATA / "byte_level")], ["tokenizer.json", "tokenizer.model", "byte level"]


def byte_level(**parts: Any) -> tokenizers.Tokenizer:
    """A vocabulary of all bytes but 0x04, and of one word."""
    alphabet = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - {"Ą"})  # ByteLevel spells 0x04 so
    vocabulary = {token: i for i, token in enumerate([*alphabet, "the", "he"])}
    library = tokenizers.Tokenizer(models.BPE(vocabulary, [("h", "e"), ("t", "he")]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for name, part in parts.items():
        setattr(library, name, part)
    return library


pieces_of_text = st.sampled_from(["the", "    ", "<s>", "▁", "é", "🙂", "\x04", "\x00"]) | st.text(max_size=3)
words = st.lists(pieces_of_text, max_size=30)


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=IDS)
@given(pieces=words, parse_special=st.booleans())
@example(["▁▁▁▁"] * 9, True)
def test_no_text_has_fewer_tokens(tokenizer: Tokenizer, pieces: list[str], parse_special: bool) -> None:
    text = "".join(pieces)
    assert tokenizer.token_bytes is not None
    assert tokenizer.token_bytes.fewest_tokens(text.encode()) <= len(tokenizer.encode(text, parse_special))


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=IDS)
def test_the_limit_is_the_longest_token_s(tokenizer: Tokenizer) -> None:
    known = tokenizer.token_bytes
    assert known is not None
    assert known.longest == 9, "in both vocabularies"
    assert [known.fewest_tokens(b"x" * size) for size in (0, 1, 9, 10)] == [0, 1, 1, 2]


@given(pieces=words)
def test_bytes_that_are_dropped_do_not_count(pieces: list[str]) -> None:
    library = byte_level()
    known, text = token_bytes(library), "".join(pieces)
    assert known is not None
    assert known.dropped == b"\x04"
    assert known.fewest_tokens(text.encode()) <= len(library.encode(text).ids)
    assert (
        known.fewest_tokens(b"the" * 50 + b"\x04" * 1000) == 50 == len(library.encode("the" * 50 + "\x04" * 1000).ids)
    )


def test_composition_shrinks_no_text_more_than_is_said() -> None:
    """Each character that stands for others: as the result of composing them, each spelled as long as it can be."""
    composed = [c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.decomposition(c)[:1].isalnum()]
    longest: dict[str, int] = {}
    for character in composed:
        parts = unicodedata.normalize("NFD", character)
        if len(parts) == 1:
            longest[parts] = max(longest.get(parts, len(parts.encode())), len(character.encode()))
    ratios = [
        sum(longest.get(part, len(part.encode())) for part in unicodedata.normalize("NFD", result))
        / len(result.encode())
        for result in (unicodedata.normalize("NFC", character) for character in composed)
    ]
    assert 3 < max(ratios) <= NFC_SHRINKS


def test_composition_is_allowed_for() -> None:
    library = byte_level(normalizer=normalizers.NFC())
    assert token_bytes(library) is None, "it drops a byte"
    library.model = models.BPE({token: i for i, token in enumerate(pre_tokenizers.ByteLevel.alphabet())}, [])
    known, text = token_bytes(library), "\u1fbe\u0308\u0301" * 100
    assert known is not None
    assert known.fewest_tokens(text.encode()) <= len(library.encode(text).ids)


FALLBACK = {token: i for i, token in enumerate([*(f"<0x{byte:02X}>" for byte in range(256)), "a"])}
UNPROVED: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "compatibility": lambda: byte_level(normalizer=normalizers.NFKC()),
    "lower case": lambda: byte_level(normalizer=normalizers.Lowercase()),
    "stripped": lambda: byte_level(normalizer=normalizers.Sequence([normalizers.NFC(), normalizers.Strip()])),
    "replaced by less": lambda: byte_level(normalizer=normalizers.Replace("  ", " ")),
    "replaced by pattern": lambda: byte_level(normalizer=normalizers.Replace(Regex(" +"), "▁▁▁▁")),
    "split at spaces": lambda: byte_level(
        pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel()])
    ),
    "split and removed": lambda: byte_level(
        pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel()])
    ),
    "no unit of bytes": lambda: tokenizers.Tokenizer(models.BPE({"a": 0}, [])),
    "a byte without fallback": lambda: tokenizers.Tokenizer(
        models.BPE({t: i for t, i in FALLBACK.items() if t != "<0x0A>"}, [], byte_fallback=True)
    ),
    "unknown words": lambda: tokenizers.Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>")),
}


@pytest.mark.parametrize("name", UNPROVED)
def test_nothing_is_said_without_proof(name: str) -> None:
    assert token_bytes(byte_level()) is not None
    assert token_bytes(tokenizers.Tokenizer(models.BPE(FALLBACK, [], byte_fallback=True))) is not None
    assert token_bytes(UNPROVED[name]()) is None


def test_a_token_that_swallows_white_space_has_no_limit() -> None:
    library = byte_level()
    library.add_tokens([AddedToken("<mask>", lstrip=True)])
    assert len(library.encode("a" + " " * 1000 + "<mask>").ids) == 2
    assert token_bytes(library) is None


CHANGES = [{"normalization_rule_name": "nmt_nfkc"}, {"remove_extra_whitespaces": True}, {"byte_fallback": False}]


@pytest.mark.parametrize("changed", CHANGES, ids=["nmt_nfkc", "spaces", "no fallback"])
def test_sentencepiece_models_that_shorten_texts(tmp_path: Path, changed: dict[str, Any]) -> None:
    given = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
    for name, options, expected in (("plain", given, True), ("changed", {**given, **changed}, False)):
        (tmp_path / name).mkdir()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["the quick brown fox"] * 20), model_prefix=str(tmp_path / name / "tokenizer"),
            vocab_size=300, hard_vocab_limit=False, model_type="bpe", minloglevel=2, **options,
        )  # fmt: skip
        tokenizer = Tokenizer.load(tmp_path / name)
        assert (tokenizer.token_bytes is not None) == expected
