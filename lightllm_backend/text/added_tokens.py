# SPDX-License-Identifier: Apache-2.0
"""Splits a text at its added tokens, as the tokenizers library does. Standard library only."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

_NOT_SPACE = re.compile(r"\S")
_WORD_CATEGORIES = ("L", "M", "Nd", "Nl", "Pc")
_JOINERS = "\u200c\u200d"


class AddedToken(NamedTuple):
    """A token that the tokenizer splits off a text before it looks for tokens of the base vocabulary."""

    content: str
    special: bool
    normalized: bool  # matched in a second pass, over the normalized text
    single_word: bool = False  # matches only where no word character is next to it
    lstrip: bool = False  # swallows the white space before it
    rstrip: bool = False

    @classmethod
    def from_json(cls, token: Mapping[str, Any], special: bool) -> AddedToken:
        """The token of a JSON object; a flag that the object leaves out has the default of tokenizers' AddedToken."""
        flags = {name: bool(token.get(name, False)) for name in ("single_word", "lstrip", "rstrip")}
        return cls(token["content"], special, bool(token.get("normalized", not special)), **flags)


class Part(NamedTuple):
    """The text between two added tokens, and its position in the whole text."""

    text: str
    start: int


class AddedTokenSplitter:
    """Splits texts at the added tokens of a vocabulary whose normalizer changes no character."""

    def __init__(self, tokens: Mapping[int, AddedToken]) -> None:
        self._tokens = {token.content: (token_id, token) for token_id, token in tokens.items()}
        self._patterns = [
            any_of(token.content for token in tokens.values() if token.normalized is normalized)
            for normalized in (False, True)
        ]

    def split(self, text: str, parse_special: bool) -> list[int | Part]:
        """Return the ids of the added tokens and the text between them, in order."""
        pieces: list[int | Part] = [Part(text, 0)]
        for pattern in self._patterns:
            pieces = [
                found
                for piece in pieces
                for found in (self._find(pattern, piece, parse_special) if isinstance(piece, Part) else (piece,))
            ]
        return pieces

    def _find(self, pattern: re.Pattern[str], part: Part, parse_special: bool) -> Iterator[int | Part]:
        text, position = part.text, 0
        for match in pattern.finditer(text):
            token_id, token = self._tokens[match[0]]
            start, end = match.span()
            if (token.special and not parse_special) or (token.single_word and _touches_word(text, start, end)):
                continue
            if token.lstrip:
                start = max(position, len(text[:start].rstrip()))
            if token.rstrip:
                following = _NOT_SPACE.search(text, end)
                end = following.start() if following else len(text)
            if position < start:
                yield Part(text[position:start], part.start + position)
            yield token_id
            position = end
        if position < len(text):
            yield Part(text[position:], part.start + position)


def any_of(spellings: Iterable[str]) -> re.Pattern[str]:
    """A pattern for the longest matching string; without strings it matches nothing."""
    return re.compile("|".join(map(re.escape, sorted(spellings, key=len, reverse=True))) or r"(?!)")


def _touches_word(text: str, start: int, end: int) -> bool:
    return any(_is_of_word(character) for character in (text[start - 1 : start], text[end : end + 1]) if character)


def _is_of_word(character: str) -> bool:
    """Whether Unicode's \\w matches; Python's \\w also matches superscripts and misses combining marks."""
    return unicodedata.category(character).startswith(_WORD_CATEGORIES) or character in _JOINERS
