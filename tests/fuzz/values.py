# SPDX-License-Identifier: Apache-2.0
"""Strategies of values that are almost right: JSON of every kind, numbers at the edges, texts that are no UTF-8."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from hypothesis import strategies as st

EDGES = (0, 1, -1, 2, 7, 64, 2**31 - 1, 2**31, 2**53 + 1, 2**63, 2**64 - 1, 2**64, 10**30, -(2**31), -(2**63) - 1)
integers = st.one_of(st.sampled_from(EDGES), st.integers(-9, 99), st.integers())
floats = st.one_of(st.sampled_from((0.0, -0.0, 0.5, 1.0, 1e-46, 1e39, 1e308)), st.floats())
texts = st.one_of(
    st.sampled_from(("", " ", "true", "False", "0", "1", "-1", "0.5", "1e400", "NaN", "[1, 2]", '["a"]', "{}", "null")),
    st.text(max_size=20),
    st.text(st.characters(categories=["Cs", "Cc", "Lu", "So"]), max_size=5),
)
scalars = st.one_of(st.none(), st.booleans(), integers, floats, texts)
json_values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=8,
)


@st.composite
def mutated(draw: st.DrawFn, base: Mapping[str, Any], others: Sequence[str] = ()) -> dict[str, Any]:
    """A valid object with up to four keys, known or not, removed or given another value."""
    changed = dict(base)
    for key in draw(st.lists(st.sampled_from((*base, *others)) | texts, max_size=4)):
        if draw(st.booleans()) and key in changed:
            del changed[key]
        else:
            changed[key] = draw(json_values)
    return changed


@st.composite
def json_texts(draw: st.DrawFn, objects: st.SearchStrategy[Any], deep: bool = True) -> str:
    """The text of an object, or one that was cut, or changed in a place, or is no JSON object, or nested deeply."""
    text = json.dumps(draw(objects))
    kind = draw(st.integers(0, 9))
    if kind == 3 and deep:
        return text.replace(": ", ": " + "[" * draw(st.sampled_from((9, 999, 99_999))), 1)
    if kind == 4 and deep:
        return '{"a":' * 9_999 + "1" + "}" * 9_999
    if kind == 0:
        return text[: draw(st.integers(0, len(text)))]
    if kind == 1:
        at = draw(st.integers(0, len(text)))
        return text[:at] + draw(texts) + text[at + 1 :]
    if kind == 2:
        return draw(texts | json_values.map(json.dumps))
    return text


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """The bytes, or their beginning, or with a few of them changed."""
    kind = draw(st.integers(0, 3))
    if kind == 0:
        return data[: draw(st.integers(0, len(data)))]
    for _ in range(draw(st.integers(0, 4)) if kind > 1 and data else 0):
        at = draw(st.integers(0, len(data) - 1))
        data = data[:at] + draw(st.binary(min_size=1, max_size=2)) + data[at + 1 :]
    return data
