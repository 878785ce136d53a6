# SPDX-License-Identifier: Apache-2.0
"""Finds the part of a JSON Schema that cannot be compiled, since llguidance says why, but not where; or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from lightllm_backend.structured_output import SCHEMA_MAPS

# Each attempt reads the whole schema. So many for a small one; fewer for a large one, so that all take half a second.
_MAX_ATTEMPTS = 200
_MAX_BYTES_READ = 2**20
_ROOT = "x-root"
# llguidance reads the numbers of a schema as floats of 64 bits, which hold no larger integers exactly.
MAX_EXACT_INTEGER = 2**53
_WITHOUT_EFFECT = ("default", "examples")


def place_of_error(schema: Any, error_of: Callable[[Any], str]) -> str:
    """Return the JSON pointer of a small part with the same error as the whole; "" if it is the whole.

    error_of: compiles a schema and returns the error, or "". In a large schema the search ends early, so the part may
    have a smaller one with the error.
    """
    root = _moved(schema)
    attempts_left = min(_MAX_ATTEMPTS, _MAX_BYTES_READ // len(json.dumps(schema)))
    reason = error_of(schema)
    seen = set()

    def has_error(place: str) -> bool:
        nonlocal attempts_left
        attempts_left -= 1
        error = error_of({"$ref": f"#/{_ROOT}{place}", _ROOT: root})
        return error.replace(f"/{_ROOT}", "") == reason  # it may name a place that is referred to

    def found(place: str, part: Any) -> str | None:
        """The place of the error within a part that has it; None if it only refers to one that is searched already."""
        seen.add(place)
        referred = list(_referred(schema, part))
        parts = [(place + step, child) for step, child in _parts(part)]
        for child_place, child in [*parts, *referred]:
            if attempts_left == 0:
                return place
            if child_place not in seen and has_error(child_place) and (inner := found(child_place, child)) is not None:
                return inner
        return None if any(referred_place in seen for referred_place, _ in referred) else place

    return found("", schema) or ""


def place_of_inexact_integer(schema: Any, place: str = "") -> tuple[str, int] | None:
    """Return the JSON pointer and the value of an integer that a float of 64 bits may not hold."""
    if isinstance(schema, int) and abs(schema) > MAX_EXACT_INTEGER:
        return place, schema
    items: Any = enumerate(schema) if isinstance(schema, list) else schema.items() if isinstance(schema, dict) else ()
    is_map = place.rpartition("/")[2] in SCHEMA_MAPS  # of names, which are no keywords
    for key, value in items:
        if (is_map or key not in _WITHOUT_EFFECT) and (
            found := place_of_inexact_integer(value, f"{place}/{_escaped(str(key))}")
        ):
            return found
    return None


def _parts(schema: Any) -> Iterator[tuple[str, Any]]:
    """The schemas within a schema, with their pointers from it. A list or an object of schemas counts as one level."""
    if not isinstance(schema, dict):
        return
    for key, value in schema.items():
        if key in ("enum", "const", "default", "examples", "required"):
            continue
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        if isinstance(value, dict) and key not in SCHEMA_MAPS:
            yield f"/{_escaped(key)}", value
        else:
            yield from ((f"/{_escaped(key)}/{_escaped(str(name))}", child) for name, child in items)


def _referred(schema: Any, part: Any) -> Iterator[tuple[str, Any]]:
    """The part of the schema that another part refers to, with its pointer, if there is one."""
    reference = part.get("$ref") if isinstance(part, dict) else None
    if not isinstance(reference, str) or not reference.startswith("#"):
        return
    found = schema
    for step in reference[1:].split("/")[1:]:
        key = step.replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict) and key in found:
            found = found[key]
        elif isinstance(found, list) and key.isdecimal() and int(key) < len(found):
            found = found[int(key)]
        else:
            return  # there is no such place, or it has another name
    yield reference[1:], found


def _moved(schema: Any) -> Any:
    """A copy whose references point to where the schema is a part of another."""
    if isinstance(schema, list):
        return [_moved(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: f"#/{_ROOT}{value[1:]}" if key == "$ref" and isinstance(value, str) and value[:1] == "#" else _moved(value)
        for key, value in schema.items()
    }


def _escaped(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1")
