# SPDX-License-Identifier: Apache-2.0
"""Tool calls are found in any text, however it is cut, and no other text is lost."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightllm_backend.front.chat.deltas import Delta, ToolCallDelta
from lightllm_backend.front.chat.tool_calls import HermesParser, Llama3Parser, ToolCallParser
from tests.front.chat.cuts import PLACES, check_cuts, cut, parse, texts_of

ONE = '{"name": "f", "arguments": {"a": [1, {"b": "}"}]}}'
NAMES = {"f", "g"}

HERMES = [
    ("only content", "Hello {world}.\n", "Hello {world}.\n", []),
    ("a call", f"<tool_call>\n{ONE}\n</tool_call>", "", [("f", '{"a": [1, {"b": "}"}]}')]),
    (
        "content and two calls",
        f'I look. \n<tool_call>{ONE}</tool_call>\n<tool_call>{{"name": "g", "arguments": {{}}}}</tool_call>\n',
        "I look.",
        [("f", '{"a": [1, {"b": "}"}]}'), ("g", "{}")],
    ),
    ("content after a call", f"<tool_call>{ONE}</tool_call>\n\nDone.", "\n\nDone.", [("f", '{"a": [1, {"b": "}"}]}')]),
    ("the name last", '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', "", [("f", '{"a": 1}')]),
    ("other keys", '<tool_call>{"id": 7, "name": "f", "arguments": {}, "x": "}"}</tool_call>', "", [("f", "{}")]),
    ("no arguments", '<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
    ("null arguments", '<tool_call>{"name": "f", "arguments": null}</tool_call>', "", [("f", "{}")]),
    ("arguments as a string", r'<tool_call>{"name":"f","arguments":"{\"a\": 1}"}</tool_call>', "", [("f", '{"a": 1}')]),
    ("a missing brace", '<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call>', "", [("f", '{"a": 1}')]),
    ("a missing end", f"<tool_call>{ONE}", "", [("f", '{"a": [1, {"b": "}"}]}')]),
    (
        "a raw line break in a string",
        '<tool_call>{"name": "f", "arguments": {"a": "x\ny"}}</tool_call>',
        "",
        [("f", '{"a": "x\\ny"}')],
    ),
    ("cut off within arguments", '<tool_call>{"name": "f", "arguments": {"a', "", [("f", '{"a')]),
    ("cut off before", 'So <tool_call>{"name": "f"', 'So <tool_call>{"name": "f"', []),
    ("cut off within the tag", "a < b <tool_c", "a < b <tool_c", []),
    ("no JSON", "<tool_call>f(1)</tool_call>", "<tool_call>f(1)</tool_call>", []),
    (
        "arguments are a number",
        '<tool_call>{"name": "f", "arguments": 3}',
        '<tool_call>{"name": "f", "arguments": 3}',
        [],
    ),
    (
        "arguments are a list",
        '<tool_call>{"name": "f", "arguments": [3]}',
        '<tool_call>{"name": "f", "arguments": [3]}',
        [],
    ),
    ("the name is a number", '<tool_call>{"name": 1, "arguments": {}}', '<tool_call>{"name": 1, "arguments": {}}', []),
    ("an unknown function", '<tool_call>{"name": "h"}</tool_call>', '<tool_call>{"name": "h"}</tool_call>', []),
    ("a call after what is none", f"<tool_call> <tool_call>{ONE}", "<tool_call>", [("f", '{"a": [1, {"b": "}"}]}')]),
    (
        "malformed arguments",
        '<tool_call>{"name": "f", "arguments": {"a": }}</tool_call>',
        "}}</tool_call>",
        [("f", '{"a": ')],
    ),
]

LLAMA3 = [
    ("only content", "Hello; [1]", "Hello; [1]", []),
    ("a call", ' {"name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')]),
    ("after the tag", 'Look: <|python_tag|>{"name": "f", "parameters": {}}', "Look:", [("f", "{}")]),
    ("two", '{"name": "f", "parameters": {}}; {"type": "function", "name": "g"}', "", [("f", "{}"), ("g", "{}")]),
    ("a semicolon at the end", '{"name": "f", "parameters": {}}; ', "", [("f", "{}")]),
    ("a list", '[{"name": "f", "parameters": {}}, {"name": "g"}]\n', "", [("f", "{}"), ("g", "{}")]),
    ("a list that is cut off", '[{"name": "f", "parameters": {}},', "", [("f", "{}")]),
    ("content after a call", '{"name": "f", "parameters": {}}; done', "; done", [("f", "{}")]),
    ("not at the beginning", 'Look: {"name": "f", "parameters": {}}', 'Look: {"name": "f", "parameters": {}}', []),
    ("an unknown function", '{"name": "h", "parameters": {}}', '{"name": "h", "parameters": {}}', []),
    ("another object", '{"a": 1}', '{"a": 1}', []),
    ("another list", " [1, 2] ", " [1, 2] ", []),
    ("code", "<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
]  # fmt: skip


@pytest.mark.parametrize(("text", "content", "calls"), [case[1:] for case in HERMES], ids=[case[0] for case in HERMES])
def test_hermes(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert check_cuts(lambda: HermesParser(NAMES), text, []) == (content, "", calls)


@pytest.mark.parametrize(("text", "content", "calls"), [case[1:] for case in LLAMA3], ids=[case[0] for case in LLAMA3])
def test_llama3(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert check_cuts(lambda: Llama3Parser(NAMES), text, []) == (content, "", calls)


PIECES = (
    *("<tool_call>", "</tool_call>", "<tool_", "<|python_tag|>"),
    *("{", "}", "[", "]", '"', ":", ",", ";", " ", "\n", "\\", "1", "null", "é", "text"),
    *('{"name": "f"', ', "arguments": ', '"parameters": ', '{"a": 1}', ONE, f"<tool_call>{ONE}</tool_call>"),
)


@pytest.mark.parametrize("parser", [HermesParser, Llama3Parser])
@settings(max_examples=80)
@given(text=texts_of(*PIECES), places=PLACES)
def test_cuts_change_nothing_and_nothing_is_lost(parser: type[ToolCallParser], text: str, places: list[int]) -> None:
    content, _, calls = check_cuts(lambda: parser(NAMES), text, places)
    if not calls:
        assert content == text
    rest = iter("".join(text.split()))
    assert all(character in rest for character in "".join(content.split())), "the content is not in order"


JSON_VALUES = st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5)
JSON_OBJECTS = st.dictionaries(
    st.text(max_size=3), JSON_VALUES | st.lists(JSON_VALUES | st.just({"a": [{}]}), max_size=3), max_size=3
)


@settings(max_examples=25)
@given(calls=st.lists(st.tuples(st.sampled_from(["f", "g"]), JSON_OBJECTS), min_size=1, max_size=3), places=PLACES)
def test_every_call_arrives_as_it_was_written(calls: list[tuple[str, dict[str, object]]], places: list[int]) -> None:
    written = [(name, json.dumps(arguments, ensure_ascii=False)) for name, arguments in calls]
    hermes = "\n".join(f'<tool_call>\n{{"name": "{n}", "arguments": {a}}}\n</tool_call>' for n, a in written)
    llama3 = "; ".join(f'{{"name": "{n}", "parameters": {a}}}' for n, a in written)
    listed = "[" + ",".join(f'{{"name": "{n}", "parameters": {a}}}' for n, a in written) + "]"
    assert parse(HermesParser(NAMES), cut("Yes.\n" + hermes, places)) == ("Yes.", "", written)
    assert parse(Llama3Parser(NAMES), cut(llama3, places)) == ("", "", written)
    assert parse(Llama3Parser(NAMES), cut(listed, places)) == ("", "", written)


def test_arguments_go_out_as_they_come() -> None:
    parser = HermesParser(NAMES)
    assert parser.feed('<tool_call>{"name": "f", "arguments": ') == []
    [head, first] = parser.feed('{"a": "x')
    assert head.tool_call is not None
    assert head.tool_call.to_plain() == {
        "index": 0,
        "id": head.tool_call.id,
        "type": "function",
        "function": {"name": "f", "arguments": ""},
    }
    assert first == Delta(tool_call=ToolCallDelta(0, '{"a": "x'))
    assert parser.feed('y"}') == [Delta(tool_call=ToolCallDelta(0, 'y"}'))]
    assert parser.feed("}</tool_call>\n") + parser.finish() == []
