# SPDX-License-Identifier: Apache-2.0
"""Splits a message at `<think>…</think>` into its reasoning and its content, while it comes."""

from __future__ import annotations

from collections.abc import Callable

from lightllm_backend.front.chat.deltas import Delta, held_length

OPENING, CLOSING = "<think>", "</think>"


class ThinkParser:
    """Takes a message that may begin with reasoning; `<think>` anywhere else is content.

    The whitespace around the reasoning is dropped, as are the line breaks before the content.
    """

    def __init__(self, begins_inside: bool = False) -> None:
        """begins_inside: the prompt ends with `<think>`, so the message begins with reasoning."""
        self._buffer = ""  # what no state has taken
        self._deltas: list[Delta] = []
        # Takes from the buffer; returns whether another state may go on.
        self._state: Callable[[], bool] = self._before_reasoning if begins_inside else self._at_start

    def feed(self, text: str) -> list[Delta]:
        self._buffer += text
        while self._state():
            pass
        deltas, self._deltas = self._deltas, []
        return deltas

    def finish(self) -> list[Delta]:
        rest, self._buffer = self._buffer, ""
        if self._state == self._at_start:
            self._add(content=rest)
        elif self._state != self._before_content:
            self._add(reasoning_content=rest.rstrip())
        return self.feed("")

    def _at_start(self) -> bool:
        text = self._buffer.lstrip()
        if text.startswith(OPENING):
            self._state = self._before_reasoning
        elif not OPENING.startswith(text):
            self._state = self._in_content
        return self._state != self._at_start

    def _before_reasoning(self) -> bool:
        self._buffer = self._buffer.lstrip()
        if self._buffer.startswith(OPENING):  # also after a prompt that ends with it: some models repeat it
            self._buffer = self._buffer[len(OPENING) :]
            return True
        if OPENING.startswith(self._buffer):
            return False
        self._state = self._in_reasoning
        return True

    def _in_reasoning(self) -> bool:
        position = self._buffer.find(CLOSING)
        is_found = position >= 0
        end = position if is_found else len(self._buffer) - held_length(self._buffer, CLOSING)
        reasoning = self._buffer[:end].rstrip()
        self._add(reasoning_content=reasoning)
        if not is_found:
            self._buffer = self._buffer[len(reasoning) :]
            return False
        self._buffer = self._buffer[end + len(CLOSING) :]
        self._state = self._before_content
        return True

    def _before_content(self) -> bool:
        self._buffer = self._buffer.lstrip("\r\n")
        if self._buffer:
            self._state = self._in_content
        return bool(self._buffer)

    def _in_content(self) -> bool:
        content, self._buffer = self._buffer, ""
        self._add(content=content)
        return False

    def _add(self, content: str = "", reasoning_content: str = "") -> None:
        if content or reasoning_content:
            self._deltas.append(Delta(content, reasoning_content))
