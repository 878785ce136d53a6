# SPDX-License-Identifier: Apache-2.0
"""The parsers of a message follow the chat template, the settings and what the request may call."""

from typing import Any

import pytest

from lightllm_backend.front.chat.parsers import find_reasoning_parser, find_tool_call_parser, make_parser
from lightllm_backend.front.chat.tool_choice import ToolChoice, read_tool_choice
from tests.front.chat.cuts import parse

QWEN = "{% if tools %}<tools>…</tools> <tool_call>{% endif %} {{ content.split('</think>') }}"
LLAMA = "{% if tools %}<|start_header_id|>ipython{% endif %}"
TOOLS = [{"type": "function", "function": {"name": name}} for name in ("f", "g")]
CALL = '{"name": "f", "arguments": {}}'
TEXT = f"<think>So.</think>Yes. <tool_call>{CALL}</tool_call>"


@pytest.mark.parametrize(
    ("template", "tool_calls", "reasoning"),
    [
        (QWEN, "hermes", "think"),
        (LLAMA, "llama3", "none"),
        ("… <|python_tag|> …", "llama3", "none"),
        ("<|start_header_id|>", "none", "none"),
        ("<tool_call><function=f>", "none", "none"),
        ("<|im_start|>", "none", "none"),
    ],
)
def test_the_template_tells(template: str, tool_calls: str, reasoning: str) -> None:
    assert (find_tool_call_parser(template), find_reasoning_parser(template)) == (tool_calls, reasoning)


def message(choice: ToolChoice, text: str = TEXT, prompt: str = "", template: str = QWEN, **settings: Any) -> Any:
    return parse(make_parser(template, prompt, choice, **settings), text)


def test_a_message_is_taken_apart() -> None:
    auto = read_tool_choice(TOOLS, "auto")
    assert message(auto) == ("Yes.", "So.", [("f", "{}")])
    assert message(auto, prompt="…<think>\n", text=TEXT.removeprefix("<think>")) == ("Yes.", "So.", [("f", "{}")])
    assert message(read_tool_choice(None, None)) == (f"Yes. <tool_call>{CALL}</tool_call>", "So.", [])
    assert message(auto, tool_call_parser="none", reasoning_parser="none") == (TEXT, "", [])
    assert message(auto, CALL, template="", tool_call_parser="llama3") == ("", "", [("f", "{}")])


def test_output_that_is_constrained_holds_no_reasoning() -> None:
    required = read_tool_choice(TOOLS, "required")
    assert message(required, f"[{CALL}, {CALL}]", "…<think>") == ("", "", [("f", "{}"), ("f", "{}")])
    assert message(ToolChoice(), '{"a": 1}', "…<think>", is_constrained=True) == ('{"a": 1}', "", [])


def test_one_call_where_several_are_not_allowed() -> None:
    one = read_tool_choice(TOOLS, "auto", several=False)
    assert message(one, f"<tool_call>{CALL}</tool_call><tool_call>{CALL}</tool_call> So.") == (
        " So.",
        "",
        [("f", "{}")],
    )
