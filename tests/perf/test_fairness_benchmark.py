# SPDX-License-Identifier: Apache-2.0
"""What a flood costs a single request of another tenant, in a simulation of seconds."""

from __future__ import annotations

from perf import fairness
from perf.lengths import Lengths


def test_a_flood_costs_another_tenant_s_request_little_and_with_a_reserve_hardly_a_wait() -> None:
    flood = [Lengths(100, 400)] * 600  # more than two pools full
    alone = fairness.simulate([], 1, 0.0)
    rows = {
        case: fairness.row("flood", case, fairness.simulate(flood, 1, reserve), 1, alone)
        for case, reserve in fairness.CASES.items()
    }
    one_tenant, tenants, reserve = rows.values()
    assert reserve["first_p99_s"] < 3 * reserve["step_ms"] / 1e3 + alone.first_token_seconds[0]
    assert max(reserve["first_p99_s"], tenants["first_p99_s"]) < one_tenant["first_p99_s"] / 10
    assert reserve["steps_p99"] <= reserve["alone_steps"] + 4
    assert reserve["output_tokens_per_second"] > 0.9 * one_tenant["output_tokens_per_second"]
