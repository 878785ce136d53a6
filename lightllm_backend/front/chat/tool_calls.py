# SPDX-License-Identifier: Apache-2.0
"""Finds tool calls in a model's text while it comes, and turns them into OpenAI's deltas.

Text that may be a call is held back until it certainly is one (CallReader says when) or certainly is none; then it
comes back as content. Arguments go out as they come. Should they turn out malformed, content begins at the error, for
what has been sent cannot be taken back. Whitespace around calls is dropped, and nothing else.
"""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from typing import ClassVar

from lightllm_backend.front.chat.call_reader import CallReader
from lightllm_backend.front.chat.deltas import Delta, ToolCallDelta, held_length


class ToolCallParser(ABC):
    """A parser of text that may hold calls, each after the mark `opening`."""

    opening: ClassVar[str]

    def __init__(self, names: Collection[str] | None = None) -> None:
        """names: the functions that there are; None: any name is good."""
        self._names = names
        self._buffer = ""  # what no state has taken
        self._held = ""  # what stands before the call that is being read: content again, if it is none
        self._raw: list[str] = []  # that call's own text, until it is one
        self._call = CallReader(names)
        self._num_calls = 0
        self._deltas: list[Delta] = []
        # Takes from the buffer; returns whether another state may go on.
        self._state: Callable[[], bool] = self._in_text

    def feed(self, text: str) -> list[Delta]:
        self._buffer += text
        while self._state():
            pass
        deltas, self._deltas = self._deltas, []
        return deltas

    def finish(self) -> list[Delta]:
        deltas = []
        while self._state != self._in_text and not self._call.is_call:
            self._give_back()
            deltas += self.feed("")
        if self._state == self._in_text:
            rest, self._buffer = self._buffer, ""
            self._add_content(rest.rstrip() if self._num_calls else rest)
        return deltas + self.feed("")

    def _in_text(self) -> bool:
        position = self._buffer.find(self.opening)
        is_found = position >= 0
        end = position if is_found else len(self._buffer) - held_length(self._buffer, self.opening)
        content = self._buffer[:end].rstrip()
        self._add_content(content)
        self._buffer = self._buffer[len(content) :]
        if is_found:
            self._begin_call(end - len(content) + len(self.opening))
        return is_found

    def _in_call(self) -> bool:
        call, was_call = self._call, self._call.is_call
        taken = call.read(self._buffer)
        text, self._buffer = self._buffer[:taken], self._buffer[taken:]
        if not was_call:
            self._raw.append(text)
        if call.is_call:
            if not was_call:
                self._add_call(ToolCallDelta(self._num_calls, id=f"call_{uuid.uuid4().hex[:24]}", name=call.name))
                self._num_calls += 1
            if arguments := call.take_arguments():
                self._add_call(ToolCallDelta(self._num_calls - 1, arguments))
        elif call.is_malformed:
            self._give_back()
            return True
        if call.is_complete or call.is_malformed:
            self._state = self._after_call
            return True
        return False

    @abstractmethod
    def _after_call(self) -> bool:
        """Take what ends a call or leads to the next."""

    def _begin_call(self, length: int) -> None:
        """Take `length` characters that stand before a call."""
        self._held, self._buffer = self._buffer[:length], self._buffer[length:]
        self._raw.clear()
        self._call = CallReader(self._names)
        self._state = self._in_call

    def _give_back(self) -> None:
        """Return what was no call to the text."""
        self._add_content(self._held)
        self._buffer = "".join(self._raw) + self._buffer
        self._state = self._in_text

    def _add_content(self, text: str) -> None:
        if text:
            self._deltas.append(Delta(content=text))

    def _add_call(self, piece: ToolCallDelta) -> None:
        self._deltas.append(Delta(tool_call=piece))


class HermesParser(ToolCallParser):
    """The form of Hermes and Qwen: `<tool_call>{"name": "f", "arguments": {...}}</tool_call>`, any number of times."""

    opening = "<tool_call>"
    closing = "</tool_call>"

    def _after_call(self) -> bool:
        text = self._buffer.lstrip()
        if text.startswith(self.closing):
            self._buffer = text[len(self.closing) :]
        elif self.closing.startswith(text):
            return False
        self._state = self._in_text
        return True


class Llama3Parser(ToolCallParser):
    """The form of Llama 3: a message that is `{"name": "f", "parameters": {...}}`, several separated by semicolons.

    They may also stand after `<|python_tag|>`, and in a list, as the schema of `tool_choice` has them.
    """

    opening = "<|python_tag|>"

    def __init__(self, names: Collection[str] | None = None) -> None:
        super().__init__(names)
        self._in_list = False
        self._begin_call(0)

    def _begin_call(self, length: int) -> None:
        super()._begin_call(length)
        self._state = self._before_call

    def _before_call(self) -> bool:
        text = self._buffer.lstrip()
        if text.startswith("[") and not self._in_list:
            self._in_list = True
            length = len(self._buffer) - len(text) + 1
            self._held, self._buffer = self._held + self._buffer[:length], self._buffer[length:]
        if text:
            self._state = self._in_call
        return bool(text)

    def _after_call(self) -> bool:
        text = self._buffer.lstrip()
        if not text:
            return False
        if text[0] == ("," if self._in_list else ";"):
            self._begin_call(len(self._buffer) - len(text) + 1)
            return True
        if self._in_list and text[0] == "]":
            self._buffer = text[1:]
        self._in_list = False
        self._state = self._in_text
        return True

    def _give_back(self) -> None:
        if self._held.strip() in (";", ",") and not self._buffer.strip():  # a separator after the last call
            self._held = ""
        self._in_list = False
        super()._give_back()
