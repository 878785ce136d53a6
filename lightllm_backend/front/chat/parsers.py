# SPDX-License-Identifier: Apache-2.0
"""Chooses the parsers of a message by the settings, or by what the model's chat template mentions."""

from __future__ import annotations

from lightllm_backend.front.chat.deltas import Delta, DeltaParser, PlainText
from lightllm_backend.front.chat.reasoning import CLOSING, OPENING, ThinkParser
from lightllm_backend.front.chat.tool_calls import HermesParser, Llama3Parser, ToolCallParser
from lightllm_backend.front.chat.tool_choice import ToolChoice

_TOOL_CALL_PARSERS: dict[str, type[ToolCallParser]] = {"hermes": HermesParser, "llama3": Llama3Parser}


def find_tool_call_parser(template: str) -> str:
    """Return the name of the parser for the calls that a chat template asks for: hermes, llama3 or none."""
    # Qwen3-Coder's calls have the same tag as Hermes' around a form of its own, with <function=…>.
    if HermesParser.opening in template and "<function=" not in template:
        return "hermes"
    is_llama3 = "<|start_header_id|>" in template and "tools" in template
    return "llama3" if is_llama3 or Llama3Parser.opening in template else "none"


def find_reasoning_parser(template: str) -> str:
    """Return the name of the parser for the reasoning that a chat template knows: think or none."""
    return "think" if CLOSING in template else "none"


def make_parser(
    template: str,
    prompt: str,
    choice: ToolChoice,
    tool_call_parser: str = "auto",
    reasoning_parser: str = "auto",
    is_constrained: bool = False,
) -> DeltaParser:
    """Make the parser of one message.

    template: the source of the chat template. prompt: what it has made of the request. is_constrained: the output has
    to follow a schema or a grammar, so that it holds no reasoning, whatever the prompt ends with.
    """
    is_constrained = is_constrained or choice.schema is not None
    parser: DeltaParser = PlainText()
    if choice.tools is not None:
        name = find_tool_call_parser(template) if tool_call_parser == "auto" else tool_call_parser
        if choice.schema is not None:
            name = "llama3"
        if name in _TOOL_CALL_PARSERS:
            calls = _TOOL_CALL_PARSERS[name](choice.names)
            parser = calls if choice.several else _OneCall(calls)
    if reasoning_parser == "auto":
        reasoning_parser = find_reasoning_parser(template)
    if reasoning_parser == "think" and not is_constrained:
        parser = _Pipe(ThinkParser(prompt.rstrip().endswith(OPENING)), parser)
    return parser


class _Pipe:
    """Passes the content of one parser's deltas on to another."""

    def __init__(self, first: DeltaParser, second: DeltaParser) -> None:
        self._first, self._second = first, second

    def feed(self, text: str) -> list[Delta]:
        return self._pass_on(self._first.feed(text))

    def finish(self) -> list[Delta]:
        return self._pass_on(self._first.finish()) + self._second.finish()

    def _pass_on(self, deltas: list[Delta]) -> list[Delta]:
        return [
            passed for delta in deltas for passed in (self._second.feed(delta.content) if delta.content else [delta])
        ]


class _OneCall:
    """Leaves out all calls but the first, for requests with `parallel_tool_calls` false."""

    def __init__(self, parser: DeltaParser) -> None:
        self._parser = parser

    def feed(self, text: str) -> list[Delta]:
        return [delta for delta in self._parser.feed(text) if delta.tool_call is None or delta.tool_call.index == 0]

    def finish(self) -> list[Delta]:
        return [delta for delta in self._parser.finish() if delta.tool_call is None or delta.tool_call.index == 0]
