# SPDX-License-Identifier: Apache-2.0
"""Values that the configurations of several tools have in common. Imports no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import regex

from lightllm_backend.models.config_fields import ConfigFields
from lightllm_backend.models.find_weights import holds_tensor
from lightllm_backend.models.quantization.scheme import Match, Rule

# The head's name; most tools never quantise it.
HEAD = "lm_head"
_HEAD_SCALES = tuple(f"{HEAD}.{name}" for name in ("weight_scale", "weight_scale_inv", "_weight_scale"))

# Rows and columns of a block of fp8.
BLOCK = 128

MIN_GROUP_SIZE = 8

# The repetitions that a regular expression may demand, as a{2} does: the package regex writes each of them out.
_MAX_REPEATS = 1000


def given(fields: ConfigFields, defaults: Mapping[str, Any]) -> ConfigFields:
    """The same with defaults, which stand for null as well: the tools write null for what they do not use."""
    values = {key: value for key, value in fields.values.items() if value is not None}
    return replace(fields, values=values, defaults=defaults)


def one_of(fields: ConfigFields, key: str, allowed: Iterable[Any]) -> Any:
    """The value, which must be one of these."""
    value, allowed = fields.get(key), list(allowed)
    if isinstance(value, bool) or value not in allowed:
        raise fields.error(key, f"allowed: {', '.join(map(repr, allowed))}")
    return value


def names(fields: ConfigFields, key: str) -> list[str]:
    """A list of names, which may be absent."""
    value = fields.get(key)
    value = [] if value is None else value
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise fields.error(key, "a list of layers' names is needed")
    return value


def nested_names(fields: ConfigFields, key: str) -> list[str]:
    """The names in a list of names and of lists of names, which may be absent."""
    value = fields.get(key)
    parts = [] if value is None else value
    if isinstance(parts, list):
        found = [name for part in parts for name in (part if isinstance(part, list) else [part])]
        if all(isinstance(name, str) for name in found):
            return found
    raise fields.error(key, "a list of layers' names is needed")


def group_size(fields: ConfigFields, key: str) -> int:
    """The input features that share a scale; 0 for -1, all of them."""
    size = fields.count(key, least=-1)
    if size != -1 and (size < MIN_GROUP_SIZE or size % MIN_GROUP_SIZE != 0):
        raise fields.error(key, f"allowed: multiples of {MIN_GROUP_SIZE}, and -1 for all input features")
    return max(size, 0)


def checked_regex(fields: ConfigFields, key: str, pattern: str) -> str:
    """The pattern, which must be a regular expression.

    The tools match with Python's `re`, so its syntax counts. The package regex, which can stop, compares the names; of
    what `re` takes, it reads a{e} (which allows an error there) and [[:alpha:]] otherwise.
    """
    try:
        re.compile(pattern)
        repeats = math.prod(max(1, int(count)) for count in re.findall(r"\{(\d+)", pattern))
        if repeats <= _MAX_REPEATS:
            regex.compile(pattern)
            return pattern
    except (re.error, regex.error, OverflowError, RecursionError, ValueError) as error:
        raise fields.error(key, f"{pattern!r} is no regular expression: {error}") from error
    raise fields.error(key, f"{pattern!r} demands {repeats} repetitions; at most {_MAX_REPEATS} are allowed")


def left_out(fields: ConfigFields, key: str, match: Match = Match.PARTS) -> list[Rule]:
    """The rules of a list of patterns whose layers are not quantised, which may be absent."""
    if match in (Match.MODULE, Match.WEIGHT):
        for pattern in names(fields, key):
            checked_regex(fields, key, f"(?:{pattern})")
    return [Rule(match, pattern, None, fields.place(key)) for pattern in names(fields, key)]


def head_left_out(fields: ConfigFields, key: str = "modules_to_not_convert") -> list[Rule]:
    """The rule of the head, unless it is quantised. `key` is the list of layers that are not.

    If that is null, nobody quantises it. If it is a list without the head, transformers does and other tools do not,
    and only the head's tensors tell who wrote the list.
    """
    is_quantised = fields.has(key) and holds_tensor(fields.path.parent, _HEAD_SCALES)
    return [] if is_quantised else [Rule(Match.EXACT, HEAD, None)]
