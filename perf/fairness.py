# SPDX-License-Identifier: Apache-2.0
"""What a flood of one tenant costs another's single requests, simulated with the real Router and without a device.

    python -m perf.fairness

The flood is there from the beginning: conversations of ShareGPT's lengths, or answers that are all as long as each
other, which end all at once. Single requests of another tenant come one after another while the flood waits. Each is
compared with itself alone in the engine. What a step takes is said in perf/simulated_engine.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from lightllm_backend.router.router import Router
from perf.admission import BATCH_MAX_TOKENS, show
from perf.lengths import DATA, Lengths, conversation_lengths
from perf.record import RESULTS, circumstances, write_result
from perf.simulated_engine import EOS_ID, Outcome, simulate_alone

CAPACITY, NUM_ROWS = 121_060, 1000
SINGLE = Lengths(200, 100)
FIRST_SECONDS, INTERVAL_SECONDS = 2.0, 3.1  # of the singles: the pool is full by then, and none meets the one before it
# The share of the pool that is kept, by the name of the case; None: all requests are of one tenant.
CASES: dict[str, float | None] = {"one tenant": None, "tenants": 0.0, "tenants, reserve 0.05": 0.05}


def floods(size: int) -> dict[str, list[Lengths]]:
    conversations = conversation_lengths(DATA / "sharegpt_lengths.csv")
    mixed = [lengths for lengths in conversations if lengths.prompt > 0 and sum(lengths) <= 2048][:size]
    return {"conversations": mixed, "answers of 1,000": [Lengths(100, 1000)] * (size // 4)}


def arrivals_of(singles: int) -> list[float]:
    return [FIRST_SECONDS + INTERVAL_SECONDS * index for index in range(singles)]


def simulate(flood: Sequence[Lengths], singles: int, reserve: float | None) -> Outcome:
    """The flood at once, and then the singles."""
    lengths = [*flood, *[SINGLE] * singles]
    arrivals = [0.0] * len(flood) + arrivals_of(singles)
    tenants = ["flood"] * len(flood) + ["flood" if reserve is None else "single"] * singles

    def router_for(clock: Callable[[], float]) -> Router:
        eos_ids, queue_size = frozenset({EOS_ID}), len(lengths)
        return Router(
            CAPACITY, NUM_ROWS, BATCH_MAX_TOKENS, queue_size, eos_ids, clock=clock, tenant_reserve=reserve or 0.0
        )  # fmt: skip

    return simulate_alone(router_for, NUM_ROWS, lengths, arrivals, tenants=tenants)


def row(flood: str, case: str, outcome: Outcome, singles: int, alone: Outcome) -> dict[str, Any]:
    first, end = outcome.first_token_seconds[-singles:], outcome.end_seconds[-singles:]
    arrivals, step_ends = np.array(arrivals_of(singles)), np.cumsum(outcome.durations)  # the flood leaves no pause
    steps = np.searchsorted(step_ends, arrivals + end) - np.searchsorted(step_ends, arrivals)
    return {
        "flood": flood,
        "case": case,
        "step_ms": 1e3 * float(np.mean(outcome.durations)),
        "alone_first_s": float(alone.first_token_seconds[0]),
        "first_p50_s": float(np.median(first)),
        "first_p99_s": float(np.quantile(first, 0.99)),
        "alone_s": float(alone.end_seconds[0]),
        "p50_s": float(np.median(end)),
        "p99_s": float(np.quantile(end, 0.99)),
        "alone_steps": len(alone.durations),
        "steps_p50": float(np.median(steps)),
        "steps_p99": float(np.quantile(steps, 0.99)),
        "output_tokens_per_second": outcome.output_tokens / outcome.seconds,
    }


@click.command(help=str(__doc__).partition("\n")[0])
@click.option("--size", default=4000, show_default=True, type=click.IntRange(min=4), help="requests of the flood")
@click.option("--singles", default=20, show_default=True, type=click.IntRange(min=1))
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "fairness.json", help="the JSON file")
def main(size: int, singles: int, out: Path) -> None:
    alone = simulate([], 1, 0.0)
    rows = [
        row(name, case, simulate(flood, singles, reserve), singles, alone)
        for name, flood in floods(size).items()
        for case, reserve in CASES.items()
    ]
    show("single requests beside a flood, and alone", rows)
    result = {"benchmark": "fairness", "size": size, "singles": singles, **circumstances(None), "rows": rows}
    write_result(out, result)


if __name__ == "__main__":
    main()
