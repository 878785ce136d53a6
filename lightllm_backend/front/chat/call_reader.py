# SPDX-License-Identifier: Apache-2.0
"""Reads the JSON object of one tool call while it comes: `{"name": "f", "arguments": {...}}`."""

from __future__ import annotations

import json
from collections.abc import Collection

from lightllm_backend.front.chat.json_scanner import WHITESPACE, JsonScanner

# The parts of a call by their keys: Hermes and Qwen say arguments, Llama 3 parameters.
_PARTS = {"name": "name", "arguments": "arguments", "parameters": "arguments"}
_MAX_NAME = 256  # characters, as spelled


class CallReader:
    """Takes a call's text; hands out its arguments, as the text of a JSON object, as soon as it is a call.

    It is one once its name and the brace that opens its arguments are there, or the whole object, for a function
    without arguments. Control characters inside strings, which models forget to escape, are handed out escaped.
    Arguments that are null count as none, and a string counts as the object that it holds.
    """

    def __init__(self, names: Collection[str] | None = None) -> None:
        """names: the functions that there are; None: any name is good."""
        self.name = ""
        self.is_call = False
        self.is_malformed = False
        self._names = names
        self._scanner = JsonScanner()
        self._seen: set[str] = set()
        self._is_object = False  # whether the value that comes is the object of arguments
        self._value: list[str] = []  # the text of any other value of a part
        self._arguments: list[str] = []  # what nobody has taken yet

    @property
    def is_complete(self) -> bool:
        return self._scanner.complete

    def read(self, text: str) -> int:
        """Take `text` up to the end of the object, or to what does not fit; return how many characters these are."""
        for position, char in enumerate(text):
            if not self._take(char):
                self.is_malformed = True
                return position
            if self.is_complete:
                return position + 1
        return len(text)

    def take_arguments(self) -> str:
        """Return the text of the arguments since the last call of this method."""
        text = "".join(self._arguments)
        self._arguments.clear()
        return text

    def _take(self, char: str) -> bool:
        key, was_in_string = self._scanner.key, self._scanner.in_string
        was_outside = self._scanner.depth == 1 and not was_in_string
        if not self._scanner.feed(char):
            return False
        if key is None:
            return self._begin_value(self._scanner.key)
        part = _PARTS.get(key)
        if self._scanner.key is None:
            return (part is None or self._end_value(part)) and (not self.is_complete or self._end_object())
        if part is not None and not (was_outside and char in WHITESPACE):
            self._add(part, json.dumps(char)[1:-1] if was_in_string and char < " " else char)
        return len(self._value) <= _MAX_NAME or part != "name"

    def _begin_value(self, key: str | None) -> bool:
        """Note the key of the value that begins, if one does; refuse a part that comes twice."""
        if self.is_complete:
            return self._end_object()
        part = None if key is None else _PARTS.get(key)
        if part is None:
            return True
        self._value.clear()
        self._is_object = False
        is_new = part not in self._seen
        self._seen.add(part)
        return is_new

    def _add(self, part: str, text: str) -> None:
        if part == "arguments" and text == "{" and not self._value:
            self._is_object = True
        if self._is_object:
            self._arguments.append(text)
            self.is_call = bool(self.name)
        else:
            self._value.append(text)

    def _end_value(self, part: str) -> bool:
        try:
            value = json.loads("".join(self._value)) if self._value else None
            if part == "name":
                if not isinstance(value, str) or not value or (self._names is not None and value not in self._names):
                    return False
                self.name = value
            elif isinstance(value, str):
                if not isinstance(json.loads(value), dict):
                    return False
                self._arguments.append(value)
            elif value is not None:
                return False
        except (ValueError, RecursionError):
            return False
        self.is_call = self.is_call or (bool(self.name) and bool(self._arguments))
        return True

    def _end_object(self) -> bool:
        if not self.is_call and not self._arguments:
            self._arguments.append("{}")
        self.is_call = bool(self.name)
        return self.is_call
