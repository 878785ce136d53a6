# SPDX-License-Identifier: Apache-2.0
"""tool_choice becomes what the template gets, and the schema that a forced call follows."""

from typing import Any

import jsonschema
import pytest

from lightllm_backend.front.chat.tool_choice import ToolChoice, name_parameters, read_tool_choice
from lightllm_backend.front.errors import ApiError

TREE = {
    "type": "object",
    "properties": {"root": {"$ref": "#/$defs/Node"}, "kind": {"enum": [{"$ref": "#"}]}},
    "required": ["root"],
    "$defs": {
        "Node": {
            "type": "object",
            "properties": {"value": {"type": "integer"}, "next": {"$ref": "#/$defs/Node"}},
            "required": ["value"],
        }
    },
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "plant", "parameters": TREE}},
    {"type": "function", "function": {"name": "now"}},
]


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def test_who_may_call() -> None:
    assert read_tool_choice(None, None) == read_tool_choice([], "auto") == ToolChoice()
    assert read_tool_choice(TOOLS, "none") == ToolChoice()
    assert read_tool_choice(TOOLS, None) == read_tool_choice(TOOLS, "auto") == ToolChoice(TOOLS)
    assert read_tool_choice(TOOLS, None).names == {"plant", "now"}


def test_a_property_may_have_the_name_of_a_keyword() -> None:
    number = {"type": "object", "properties": {"default": {"$ref": "#/$defs/N"}}, "$defs": {"N": {"type": "integer"}}}
    schema = read_tool_choice([{"function": {"name": "set", "parameters": number}}], "required").schema
    assert follows(schema, [{"name": "set", "parameters": {"default": 1}}])
    assert not follows(schema, [{"name": "set", "parameters": {"default": "1"}}])


def test_parameters_that_are_nested_too_deeply_are_named() -> None:
    def tools(levels: int) -> list[dict[str, Any]]:
        parameters: dict[str, Any] = {}
        for _ in range(levels - 1):
            parameters = {"not": parameters}
        return [TOOLS[1], {"function": {"name": "dig", "parameters": parameters}}]

    assert read_tool_choice(tools(61), "required").schema
    with pytest.raises(ApiError, match=r"tools.1.function.parameters is nested more than 61 levels deep"):
        read_tool_choice(tools(62), "required")


CALL = {"name": "plant", "parameters": {"root": {"value": 1, "next": {"value": 2}}, "kind": {"$ref": "#"}}}


@pytest.mark.parametrize(
    ("choice", "several", "good", "bad"),
    [
        ("required", True, [[CALL], [CALL, {"name": "now", "parameters": {}}]], [[], CALL, [{"name": "now"}]]),
        ("required", False, [CALL, {"name": "now", "parameters": {}}], [[CALL], {"name": "then", "parameters": {}}]),
        (
            named("plant"),
            True,
            [CALL],
            [{"name": "now", "parameters": {}}, {**CALL, "parameters": {"root": {"value": "1"}}}, {**CALL, "x": 1}],
        ),
    ],
)
def test_a_forced_call_follows_a_schema(choice: Any, several: bool, good: list[Any], bad: list[Any]) -> None:
    schema = read_tool_choice(TOOLS, choice, several).schema
    assert [follows(schema, value) for value in (*good, *bad)] == [True] * len(good) + [False] * len(bad)


def follows(schema: Any, value: Any) -> bool:
    """Whether the value is valid by the schema."""
    return bool(jsonschema.Draft202012Validator(schema).is_valid(value))


NAMED = "tools.1.function.parameters"


@pytest.mark.parametrize(
    ("told", "message", "field"),
    [
        ("tools cannot be followed: no", "tools cannot be followed: no", "tools"),
        ("tools: json_schema at {}/items: no", f"{NAMED}: json_schema at /items: no", NAMED),
        ("tools: json_schema at {}: no", f"{NAMED}: json_schema: no", NAMED),
        ("tools: json_schema at {}: no '{}/x'", f"{NAMED}: json_schema: no '/x'", NAMED),
    ],
)
def test_a_refusal_names_the_parameters(told: str, message: str, field: str) -> None:
    """The place in the schema is where that schema has the parameters of this tool."""
    schema = read_tool_choice(TOOLS, named("now")).schema
    assert schema is not None
    [place] = schema["$defs"]
    assert name_parameters(told.replace("{}", f"/$defs/{place}")) == (message, field)


@pytest.mark.parametrize(
    ("tools", "choice", "field", "words"),
    [
        (None, "required", "tool_choice", "tools is empty"),
        (TOOLS, named("then"), "tool_choice", "the function plant, the function now"),
        (TOOLS, "always", "tool_choice", "none, auto, required"),
        (TOOLS, {"type": "allowed_tools"}, "tool_choice", "none, auto, required"),
        ([TOOLS[1], TOOLS[1]], "auto", "tools", "different names"),
    ],
)
def test_what_makes_no_sense_is_refused(tools: Any, choice: Any, field: str, words: str) -> None:
    with pytest.raises(ApiError, match=words) as refused:
        read_tool_choice(tools, choice)
    assert (refused.value.status, refused.value.param) == (400, field)
