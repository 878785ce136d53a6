# SPDX-License-Identifier: Apache-2.0
"""Checks a JSON text (RFC 8259) character by character, so that an error shows where it is and not at the end."""

from __future__ import annotations

import re

WHITESPACE = " \t\n\r"
_WORDS = ("true", "false", "null")
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_NUMBER_BEGINNING = re.compile(r"-?(0|[1-9][0-9]*)?(\.[0-9]*)?([eE][+-]?[0-9]*)?")
_MAX_WORD = 64  # characters of a number; each one costs another look at all of them
_MAX_KEY = 64  # characters of a key that are kept; nobody asks for a longer one
_ESCAPED = '"\\/bfnrt'
_HEXADECIMAL = frozenset("0123456789abcdefABCDEF")


class JsonScanner:
    """Takes one JSON object, character by character.

    It is lenient in one point: a string may hold control characters, such as the line breaks that models forget to
    escape.
    """

    def __init__(self) -> None:
        self.key: str | None = None  # the key of the outer object whose value comes now, as it is spelled
        self.in_string = False
        self.complete = False
        self._open: list[str] = []  # what closes each container that is open
        self._expected = "object"
        self._escape = ""  # what has come of an escape sequence
        self._word = ""  # what has come of a number, true, false or null
        self._outer_key = ""

    @property
    def depth(self) -> int:
        """The number of objects and arrays that are open."""
        return len(self._open)

    def feed(self, char: str) -> bool:
        """Take the next character; return whether the text may still become an object. After False, stop feeding."""
        if self.in_string:
            return self._in_string(char)
        if self._word:
            if char not in WHITESPACE and char not in ",]}":
                self._word += char
                return len(self._word) <= _MAX_WORD and _may_become_a_word(self._word)
            if self._word not in _WORDS and not _NUMBER.fullmatch(self._word):
                return False
            self._word = ""
        if char in WHITESPACE:
            return True
        return self._between(char)

    def _in_string(self, char: str) -> bool:
        if self._expected == "colon" and self.depth == 1 and len(self._outer_key) <= _MAX_KEY:
            self._outer_key += char
        if self._escape:
            if self._escape == "\\" and char != "u":
                self._escape = ""
                return char in _ESCAPED
            self._escape += char
            if len(self._escape) > 2 and char not in _HEXADECIMAL:
                return False
            if len(self._escape) == len("\\uXXXX"):
                self._escape = ""
        elif char == "\\":
            self._escape = char
        elif char == '"':
            self.in_string = False
        return True

    def _between(self, char: str) -> bool:
        expected = self._expected
        if expected == "comma":
            if char != ",":
                return self._close(char)
            if self.depth == 1:
                self.key = None
            self._expected = "key" if self._open[-1] == "}" else "value"
            return True
        if expected == "colon":
            if char != ":":
                return False
            if self.depth == 1:
                self.key = self._outer_key[:-1]
            self._expected = "value"
            return True
        if expected in ("key", "first key"):
            if char == '"':
                self._outer_key = ""
                self.in_string, self._expected = True, "colon"
                return True
            return expected == "first key" and self._close(char)
        return self._begin_value(char)

    def _begin_value(self, char: str) -> bool:
        if char == "{":
            self._open.append("}")
            self._expected = "first key"
            return True
        if self._expected == "object":
            return False
        if self._expected == "first value" and char == "]":
            return self._close(char)
        if char == "[":
            self._open.append("]")
            self._expected = "first value"
            return True
        self._expected = "comma"
        if char == '"':
            self.in_string = True
            return True
        self._word = char
        return _may_become_a_word(char)

    def _close(self, char: str) -> bool:
        if char != self._open[-1]:
            return False
        self._open.pop()
        self._expected = "comma"
        if not self._open:
            self.complete, self.key = True, None
        return True


def _may_become_a_word(text: str) -> bool:
    return any(word.startswith(text) for word in _WORDS) or _NUMBER_BEGINNING.fullmatch(text) is not None
