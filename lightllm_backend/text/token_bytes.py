# SPDX-License-Identifier: Apache-2.0
"""How many bytes of a text one token can stand for, so that a text that cannot fit is refused without encoding it.

Both functions return None unless they can prove a limit: for a normalizer that may shorten a text, for a pre-tokenizer
that drops characters, and for unknown characters, of which one token may stand for any number. Texts are UTF-8.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import tokenizers

from lightllm_backend.text.added_tokens import AddedToken
from lightllm_backend.text.incremental_decoding import byte_level_alphabet

if TYPE_CHECKING:
    import sentencepiece

# Canonical composition: U+1FBE U+0308 U+0301, 7 bytes, become U+0390, 2 bytes; no text shrinks more (a test looks).
NFC_SHRINKS = 4
# These pre-tokenizers split a text and keep all of it; "Removed" is the one behavior that does not.
_KEEP_EVERYTHING = {"ByteLevel", "Digits", "Metaspace", "Punctuation", "Split", "UnicodeScripts"}
_BYTES = range(256)
# Field numbers of sentencepiece_model.proto; the Python module of that name needs a newer protobuf than tritonclient's.
_TRAINER_SPEC, _NORMALIZER_SPEC = 2, 3
_MODEL_TYPE, _UNIGRAM, _BPE = 3, 1, 2
_PRECOMPILED_CHARSMAP, _REMOVE_EXTRA_WHITESPACES = 2, 4


class TokenBytes(NamedTuple):
    """The most bytes of a text that one token stands for, not counting those that the tokenizer drops."""

    longest: int
    dropped: bytes = b""  # bytes without a token, which byte-level vocabularies drop without a word

    def fewest_tokens(self, text: bytes) -> int:
        """The least number of tokens that the text can have."""
        return -(-len(text.translate(None, self.dropped)) // self.longest)


def token_bytes(inner: tokenizers.Tokenizer) -> TokenBytes | None:
    """The limit for a tokenizer of the tokenizers library."""
    model, added = inner.model, inner.get_added_tokens_decoder().values()
    if not isinstance(model, tokenizers.models.BPE) or model.continuing_subword_prefix or model.end_of_word_suffix:
        return None
    if any(token.lstrip or token.rstrip for token in added):  # they swallow any amount of white space
        return None
    shrinks = _normalizer_shrinks(_state(inner.normalizer))
    splitters = list(_steps(_state(inner.pre_tokenizer), "pretokenizers"))
    if shrinks is None or any(
        splitter["type"] not in _KEEP_EVERYTHING or splitter.get("behavior") == "Removed" for splitter in splitters
    ):
        return None
    vocabulary, alphabet = inner.get_vocab(with_added_tokens=False), byte_level_alphabet()
    longest_added = _longest(token.content for token in added)
    if any(splitter["type"] == "ByteLevel" for splitter in splitters):
        dropped = bytes(byte for character, byte in alphabet.items() if character not in vocabulary)
        if dropped and shrinks > 1:  # composition may make bytes that are dropped of others
            return None
        return TokenBytes(max(longest_added, *map(len, vocabulary)) * shrinks, dropped)  # one character a byte
    if model.byte_fallback and all(f"<0x{byte:02X}>" in vocabulary for byte in _BYTES):
        return TokenBytes(max(longest_added, _longest(vocabulary)) * shrinks)
    return None


def sentencepiece_token_bytes(
    inner: sentencepiece.SentencePieceProcessor, added: Mapping[int, AddedToken]
) -> TokenBytes | None:
    """The limit for a sentencepiece model, whose texts are split at the added tokens first."""
    model = inner.serialized_model_proto()
    trainer = _fields(b"".join(_values(model, _TRAINER_SPEC)))
    normalizer = _fields(b"".join(_values(model, _NORMALIZER_SPEC)))
    if trainer.get(_MODEL_TYPE, _UNIGRAM) not in (_UNIGRAM, _BPE):
        return None
    if normalizer.get(_PRECOMPILED_CHARSMAP) or normalizer.get(_REMOVE_EXTRA_WHITESPACES, 1):
        return None
    if any(token.lstrip or token.rstrip for token in added.values()):
        return None
    ids = range(inner.get_piece_size())
    if sum(map(inner.is_byte, ids)) < len(_BYTES):
        return None
    return TokenBytes(max(_longest(map(inner.id_to_piece, ids)), _longest(token.content for token in added.values())))


def _longest(spellings: Iterable[str]) -> int:
    return max((len(spelling.encode()) for spelling in spellings), default=0)


def _state(part: Any) -> dict[str, Any] | None:
    """The JSON object of a normalizer or pre-tokenizer; None if there is none."""
    return json.loads(part.__getstate__()) if part else None


def _steps(state: dict[str, Any] | None, key: str) -> Iterator[dict[str, Any]]:
    """The parts of a normalizer or pre-tokenizer that is not itself a sequence."""
    if state and state["type"] == "Sequence":
        for step in state[key]:
            yield from _steps(step, key)
    elif state:
        yield state


def _normalizer_shrinks(state: dict[str, Any] | None) -> int | None:
    """By which factor a normalizer may shorten a text at most; None if that is not known."""
    shrinks = 1
    for step in _steps(state, "normalizers"):
        if step["type"] == "NFC":
            shrinks *= NFC_SHRINKS
        elif step["type"] == "Replace":
            pattern = step["pattern"].get("String")
            if pattern is None or len(step["content"].encode()) < len(pattern.encode()):
                return None
        elif step["type"] != "Prepend":
            return None
    return shrinks


def _fields(message: bytes) -> dict[int, int | bytes]:
    """The fields of a protocol-buffer message by number; of repeated ones the last."""
    return dict(_read(message))


def _values(message: bytes, number: int) -> list[bytes]:
    """All values of one length-delimited field."""
    return [value for field, value in _read(message) if field == number and isinstance(value, bytes)]


def _read(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Each field of a protocol-buffer message: its number, and its value as an integer or as bytes."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        match key & 7:
            case 0:
                value, position = _varint(message, position)
                yield key >> 3, value
                continue
            case 2:
                size, position = _varint(message, position)
            case kind:
                size = {1: 8, 5: 4}[kind]
        yield key >> 3, message[position : position + size]
        position += size


def _varint(message: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        value, shift, position = value | (byte & 0x7F) << shift, shift + 7, position + 1
        if byte < 0x80:
            return value, position
