# SPDX-License-Identifier: Apache-2.0
"""Target: what is fed with random input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from hypothesis import strategies as st


class Target(NamedTuple):
    """One parser: how its inputs are made, and what must hold for each."""

    inputs: st.SearchStrategy[Any]
    check: Callable[[Any], None]
    cases_each: int = 1  # how many cases a drawn input is
