# SPDX-License-Identifier: Apache-2.0
"""The figures of clients that read nothing: the pace of their neighbours, and what a process has grown by."""

from __future__ import annotations

from typing import Any

import pytest

from perf.slow_readers import PHASES, Neighbours, summary


def test_the_pace_counts_the_tokens_of_a_time() -> None:
    neighbours = Neighbours([[], []], [(0.5, 7), (1.0, 2), (1.9, 4), (3.0, 9)])
    assert neighbours.pace(1.0, 3.0) == pytest.approx(6 / 2 / 2)


def test_each_phase_is_compared_with_its_own_round() -> None:
    paces = {0: (10.0, 9.0, 8.0), 1: (5.0, 5.0, 4.75), 2: (20.0, 18.0, 20.0)}
    phases: list[dict[str, Any]] = [
        {
            "round": number, "phase": phase, "tokens_per_second": pace, "gaps": {"p99": 0.1 * (number + 1)},
            "mb_before": {"worker": 5.0}, "mb_after": {"worker": 5.0 + number, "tokenizer": 3.0},
        }
        for number, row in paces.items() for phase, pace in zip(PHASES, row, strict=True)
    ]  # fmt: skip
    figures = summary([*phases, {"phase": "after", "mb_after": {}}])
    assert figures["pace"][PHASES[2]] == pytest.approx({"median": 0.95, "least": 0.8})
    assert figures["pace"][PHASES[1]]["least"] == pytest.approx(0.9)
    assert figures["growth_mb"] == {"worker": 2.0, "tokenizer": 0.0}
    assert figures["p99_gap_ms"][PHASES[0]] == pytest.approx(200)
