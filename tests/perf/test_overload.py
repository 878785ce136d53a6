# SPDX-License-Identifier: Apache-2.0
"""The figures of a flood: which pauses of a stream lie in it."""

from __future__ import annotations

import pytest

from perf.overload import gaps, percentiles


def test_a_pause_counts_if_any_of_it_lies_in_the_time() -> None:
    streams = [[0.0, 1.0, 2.5, 6.0], [3.0, 3.5]]
    assert gaps(streams, 2.0, 4.0) == pytest.approx([1.5, 3.5, 0.5])
    assert gaps(streams, 7.0, 9.0) == []


def test_percentiles_of_nothing_are_none() -> None:
    assert percentiles([]) == {}
    assert percentiles([1.0, 3.0]) == pytest.approx({"p50": 2.0, "p99": 2.98, "p99.9": 2.998, "max": 3.0})
