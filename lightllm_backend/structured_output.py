# SPDX-License-Identifier: Apache-2.0
"""Structured output as clients ask for it: each of their options becomes one text. Standard library only.

The text is a JSON object with one of KINDS. Two requests that ask for the same have the same text, by which the worker
caches what it compiles. An empty text asks for nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from lightllm_backend.client_json import MAX_JSON_DEPTH, NotExact, is_deeper, parse_json

KINDS = ("json_schema", "json_object", "regex", "choice", "grammar")
MAX_BYTES = 128 * 1024
MAX_CHOICES = 1024
MAX_SCHEMA_DEPTH = MAX_JSON_DEPTH - 1  # the object with the kind is one level
# Keywords of a JSON schema whose keys are names, and no keywords.
SCHEMA_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")

# What other servers call them: in vLLM's `structured_outputs`, and as the type of TensorRT-LLM's guide.
_VLLM_KINDS = {"json": "json_schema", "json_object": "json_object", "regex": "regex", "choice": "choice"} | {
    "grammar": "grammar"
}
_GUIDE_TYPES = {"json": "json_object", "json_schema": "json_schema", "regex": "regex", "ebnf_grammar": "grammar"}


def structured_output(value: Any) -> str:
    """Convert our own option: an object with one of KINDS, or its text."""
    if value in ("", {}):
        return ""
    return _only_one(_object(value), {kind: kind for kind in KINDS})


def vllm_structured_outputs(value: Any) -> str:
    """Convert vLLM's object: one of its kinds; its other keys are allowed where they change nothing."""
    if value in ("", {}, [], ()):
        return ""
    given = {key: item for key, item in _object(value).items() if item is not None and item is not False}
    return _only_one(given, _VLLM_KINDS) if given else ""


def response_format(value: Any) -> str:
    """Convert OpenAI's object with a type: text, json_object or json_schema."""
    if value == "":
        return ""
    given = _object(value)
    kind = given.get("type")
    if kind == "text":
        return ""
    if kind == "json_object":
        return of_kind("json_object")(True)
    if kind != "json_schema":
        raise NotExact(f"whose type is {json.dumps(kind)[:80]}")
    named = given.get("json_schema")
    if not isinstance(named, dict) or "schema" not in named:
        raise NotExact("which has no json_schema.schema")
    return of_kind("json_schema")(named["schema"])


def of_kind(kind: str) -> Callable[[Any], str]:
    """Return the converter of an option that always asks for this kind."""

    def convert(value: Any) -> str:
        if value in ("", [], ()):
            return ""
        return text_of(kind, value)

    return convert


def of_guide(guide_type: str, guide: str) -> str:
    """Convert TensorRT-LLM's two tensors. Raise NotExact for a type that has no counterpart."""
    if guide_type not in _GUIDE_TYPES:
        raise NotExact(f"which is none of {', '.join(_GUIDE_TYPES)}")
    kind = _GUIDE_TYPES[guide_type]
    return text_of(kind, True if kind == "json_object" else guide)


def _only_one(given: dict[str, Any], kinds: dict[str, str]) -> str:
    unknown = [key for key in given if key not in kinds]
    if unknown or len(given) != 1:
        keys = ", ".join(map(str, given))[:180]
        keys = keys.encode(errors="replace").decode()  # JSON can spell half a surrogate pair
        raise NotExact(f"which has the keys {keys}" if given else "which is empty")
    [(key, value)] = given.items()
    return text_of(kinds[key], value)


def text_of(kind: str, value: Any) -> str:
    """Make the text that asks for one of KINDS. Raise NotExact with the reason if the value is none of the kind."""
    value = _CHECKS[kind](value)
    text = json.dumps({kind: value}, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    size = len(text.encode())  # raises ValueError for a lone surrogate, which JSON can encode
    if size > MAX_BYTES:
        raise NotExact(f"which takes {size} bytes; at most {MAX_BYTES} do")
    return text


def _object(value: Any) -> dict[str, Any]:
    parsed = _parsed(value)
    if not isinstance(parsed, dict):
        raise NotExact("which is no object")
    return parsed


def _parsed(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except NotExact:
        raise
    except ValueError as error:
        raise NotExact(f"which is not JSON ({error})") from None


def _schema(value: Any) -> dict[str, Any]:
    schema = _parsed(value)
    if isinstance(schema, dict):
        if is_deeper(schema, MAX_SCHEMA_DEPTH):
            raise NotExact(f"which is nested more than {MAX_SCHEMA_DEPTH} levels deep")
        return schema
    if schema is True:
        return {}
    raise NotExact("whose JSON Schema is no object")


def _true(value: Any) -> bool:
    if value is not True:
        raise NotExact("whose json_object is not true")
    return True


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise NotExact("which is no text")
    return value


def _choices(value: Any) -> list[str]:
    needed = NotExact(f"whose choice is no list of 1 to {MAX_CHOICES} texts")
    try:
        choices = _parsed(value)
    except NotExact:
        raise needed from None
    if not isinstance(choices, (list, tuple)) or not 1 <= len(choices) <= MAX_CHOICES:
        raise needed
    if not all(isinstance(choice, str) and choice for choice in choices):
        raise needed
    return list(choices)


_CHECKS: dict[str, Callable[[Any], Any]] = {
    "json_schema": _schema,
    "json_object": _true,
    "regex": _text,
    "choice": _choices,
    "grammar": _text,
}
