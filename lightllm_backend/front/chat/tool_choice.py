# SPDX-License-Identifier: Apache-2.0
"""Reads `tools`, `tool_choice` and `parallel_tool_calls` of a chat request.

The output of a request that has to call a function is constrained by a JSON schema to what Llama3Parser reads, with any
model: `{"name": "f", "parameters": {...}}`, or a list of such objects where several calls are allowed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightllm_backend.client_json import is_deeper
from lightllm_backend.front.errors import nested_too_deeply, refusal
from lightllm_backend.structured_output import MAX_SCHEMA_DEPTH, SCHEMA_MAPS

_PARAMETERS = re.compile(r"/\$defs/parameters(\d+)")  # where `calls_schema` has those of a function
_MAX_PARAMETERS_DEPTH = MAX_SCHEMA_DEPTH - 2  # `calls_schema` has two levels around them
# Keywords whose values are data and not schemas, so that "$ref" in them refers to nothing.
_DATA = ("const", "default", "enum", "examples")


@dataclass(frozen=True)
class ToolChoice:
    """What a request may call, and must."""

    tools: Sequence[Mapping[str, Any]] | None = None  # for the chat template; None: the model calls nothing
    schema: Mapping[str, Any] | None = None  # the output has to follow it; None: the model is free
    several: bool = True  # whether the message may have more than one call

    @property
    def names(self) -> frozenset[str]:
        return frozenset(tool["function"]["name"] for tool in self.tools or ())


def read_tool_choice(
    tools: Sequence[Mapping[str, Any]] | None, tool_choice: str | Mapping[str, Any] | None, several: bool = True
) -> ToolChoice:
    """Read the fields of a request; raise ApiError 400 for what makes no sense together.

    tools: each `{"type": "function", "function": {"name": …, "parameters": …}}`, with the schema of an object.
    tool_choice: none, auto, required, or the function to call. several: the field parallel_tool_calls.
    """
    if tool_choice is None:
        tool_choice = "auto" if tools else "none"
    if tool_choice == "none" or (tool_choice == "auto" and not tools):
        return ToolChoice()
    names = [tool["function"]["name"] for tool in tools or ()]
    if len(set(names)) < len(names):
        raise refusal("tools", names, "functions with different names")
    if isinstance(tool_choice, str):
        if tool_choice not in ("auto", "required"):
            raise refusal("tool_choice", tool_choice, "none, auto, required, or a function of tools")
        chosen = list(enumerate(tools or ()))
    else:
        function = tool_choice.get("function")
        name = function.get("name") if isinstance(function, Mapping) else None
        chosen = [(number, tool) for number, tool in enumerate(tools or ()) if tool["function"]["name"] == name]
    if not chosen:
        allowed = "none, auto, required" + "".join(f", the function {name}" for name in names)
        raise refusal("tool_choice", tool_choice, allowed if tools else "none or auto, since tools is empty")
    if tool_choice == "auto":
        return ToolChoice(tools, None, several)
    return ToolChoice(tools, calls_schema(chosen, several and tool_choice == "required"), several)


def calls_schema(tools: Sequence[tuple[int, Mapping[str, Any]]], several: bool) -> dict[str, Any]:
    """Return the schema of a call of one of the functions; several: of a list of at least one call.

    tools: each with its number in the field `tools`.
    """
    definitions: dict[str, Any] = {}
    calls = []
    for number, tool in tools:
        function = tool["function"]
        if is_deeper(function.get("parameters"), _MAX_PARAMETERS_DEPTH):
            raise nested_too_deeply(f"tools.{number}.function.parameters", _MAX_PARAMETERS_DEPTH)
        definitions[f"parameters{number}"] = _moved(
            function.get("parameters") or {"type": "object", "properties": {}}, f"#/$defs/parameters{number}"
        )
        calls.append(
            {
                "type": "object",
                "properties": {
                    "name": {"const": function["name"]},
                    "parameters": {"$ref": f"#/$defs/parameters{number}"},
                },
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
        )
    call = calls[0] if len(calls) == 1 else {"anyOf": calls}
    schema = {"type": "array", "items": call, "minItems": 1} if several else call
    return {**schema, "$defs": definitions}


def name_parameters(message: str) -> tuple[str, str]:
    """Name the parameters that a refusal of `calls_schema` is about; return the message and the field.

    message: begins with "tools", and may have the place within the schema.
    """
    found = _PARAMETERS.search(message)
    if not found:
        return message, "tools"
    field = f"tools.{found[1]}.function.parameters"
    message = message.replace(f"json_schema at {found[0]}:", "json_schema:").replace(found[0], "")
    return field + message.removeprefix("tools"), field


def _moved(schema: Any, place: str) -> Any:
    """Return a copy of a schema whose references within itself are right at `place` of another."""
    if isinstance(schema, list):
        return [_moved(item, place) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    moved: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "$ref" and isinstance(value, str) and value.startswith("#"):
            moved[key] = place + value[1:]
        elif key in SCHEMA_MAPS and isinstance(value, Mapping):
            moved[key] = {name: _moved(child, place) for name, child in value.items()}
        else:
            moved[key] = value if key in _DATA else _moved(value, place)
    return moved
