# SPDX-License-Identifier: Apache-2.0
"""What the parsers of this folder make of a model's text: deltas of a message, as OpenAI's API streams them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class ToolCallDelta:
    """A piece of the tool call number `index`. The first piece of each call, and no other, has its id and its name."""

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None

    def to_plain(self) -> dict[str, Any]:
        """Return the piece as it stands in `delta.tool_calls`."""
        if self.id is None:
            return {"index": self.index, "function": {"arguments": self.arguments}}
        function = {"name": self.name, "arguments": self.arguments}
        return {"index": self.index, "id": self.id, "type": "function", "function": function}


@dataclass(frozen=True)
class Delta:
    """A piece of a message. Exactly one of the three holds something."""

    content: str = ""
    reasoning_content: str = ""
    tool_call: ToolCallDelta | None = None

    def to_plain(self) -> dict[str, Any]:
        """Return the piece as it stands in a choice's `delta`."""
        if self.tool_call is not None:
            return {"tool_calls": [self.tool_call.to_plain()]}
        return {"content": self.content} if self.content else {"reasoning_content": self.reasoning_content}


class DeltaParser(Protocol):
    """Turns a message's text into deltas while it comes. The division of the text into pieces changes no message."""

    def feed(self, text: str) -> list[Delta]:
        """Take the next piece of the text; return what is certain now."""
        ...

    def finish(self) -> list[Delta]:
        """Return what was held back. Called once, after the last piece."""
        ...


class PlainText:
    """The parser of a message that is content and nothing else."""

    def feed(self, text: str) -> list[Delta]:
        return [Delta(content=text)] if text else []

    def finish(self) -> list[Delta]:
        return []


@dataclass
class Message:
    """A whole message, put together from its deltas."""

    content: str = ""
    reasoning_content: str = ""
    tool_calls: list[dict[str, Any]] | None = None  # as they stand in `message.tool_calls`; None: there are none

    @classmethod
    def join(cls, deltas: Iterable[Delta]) -> Message:
        """Put a message together from all its deltas."""
        message, calls = cls(), []
        for delta in deltas:
            message.content += delta.content
            message.reasoning_content += delta.reasoning_content
            if delta.tool_call is None:
                continue
            if delta.tool_call.id is not None:
                calls.append({key: value for key, value in delta.tool_call.to_plain().items() if key != "index"})
            else:
                calls[-1]["function"]["arguments"] += delta.tool_call.arguments
        message.tool_calls = calls or None
        return message

    def to_plain(self) -> dict[str, Any]:
        """Return the message as it stands in a choice. Beside tool calls, content that is empty is null."""
        plain: dict[str, Any] = {"role": "assistant", "content": self.content, "refusal": None}
        if self.reasoning_content:
            plain["reasoning_content"] = self.reasoning_content
        if self.tool_calls is not None:
            plain |= {"content": self.content or None, "tool_calls": self.tool_calls}
        return plain


def held_length(text: str, mark: str) -> int:
    """Return the length of the longest end of `text` that may become `mark`: a beginning of it, but not all of it."""
    for length in range(min(len(text), len(mark) - 1), 0, -1):
        if mark.startswith(text[-length:]):
            return length
    return 0
