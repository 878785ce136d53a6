# SPDX-License-Identifier: Apache-2.0
"""StepMemo: what the references of attention derive from a step's tables, once for all layers."""

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

# By a name and what else the value depends on. All calls with one memo share rows, lengths, slots and rotations.
StepMemo = dict[Hashable, Any]

_T = TypeVar("_T")


def once(memo: StepMemo | None, key: Hashable, compute: Callable[[], _T]) -> _T:
    """The memo's value under `key`, which is computed if it is not there; computed each time without a memo."""
    if memo is None:
        return compute()
    if key not in memo:
        memo[key] = compute()
    value: _T = memo[key]
    return value
