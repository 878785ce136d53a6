# SPDX-License-Identifier: Apache-2.0
"""What admission makes of the KV pool, simulated with the real Router and without a device.

    python -m perf.admission

First with all requests of the workload at once, each of known length, and no limit but the pool: the share of its slots
that hold a live token while there is a queue, averaged over the steps and over their time.

Then with Poisson arrivals, where each request asks for 1,024 tokens and ends at its true length: exact admission, the
estimate from recent lengths (past_future), and exact admission that knows the true lengths. What a step takes is said
in perf/simulated_engine.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from lightllm_backend.router.admission import AdmissionPolicy, ExactAdmission
from lightllm_backend.router.past_future import PastFutureAdmission
from lightllm_backend.router.router import Router
from perf.lengths import DATA, Lengths, conversation_lengths
from perf.record import RESULTS, circumstances, write_result
from perf.simulated_engine import EOS_ID, Outcome, simulate_alone

BATCH_MAX_TOKENS = 8192
ASKED_FOR = 1024
POLICIES: dict[str, tuple[Callable[[], AdmissionPolicy], int | None]] = {
    "exact": (ExactAdmission, ASKED_FOR),
    "past_future": (PastFutureAdmission, ASKED_FOR),
    "lengths known": (ExactAdmission, None),
}


def simulate(
    capacity: int, lengths: Sequence[Lengths], arrivals: Sequence[float] | None = None, policy: str = "lengths known"
) -> Outcome:
    """All at once if there are no arrivals."""
    num_rows = len(lengths)
    make_policy, max_tokens = POLICIES[policy]

    def router_for(clock: Callable[[], float]) -> Router:
        eos_ids = frozenset({EOS_ID})
        return Router(capacity, num_rows, BATCH_MAX_TOKENS, num_rows, eos_ids, clock=clock, policy=make_policy())

    return simulate_alone(router_for, num_rows, lengths, arrivals or [0.0] * num_rows, max_tokens)


def pool_use(capacity: int, outcome: Outcome) -> dict[str, Any]:
    """Until the queue is empty for good."""
    until = outcome.steps_with_queue
    shares, durations = outcome.pool_shares[:until], outcome.durations[:until]
    return {
        "pool_tokens": capacity,
        "steps": until,
        "running": float(np.mean(outcome.running[:until])),
        "share_by_step": float(np.mean(shares)),
        "share_by_time": float(np.average(shares, weights=durations)),
    }


def service(capacity: int, policy: str, outcome: Outcome) -> dict[str, Any]:
    """What the clients see."""
    p50, p90, p99 = np.quantile(outcome.first_token_seconds, (0.5, 0.9, 0.99)).tolist()
    return {
        "policy": policy,
        **pool_use(capacity, outcome),
        "requests_per_second": len(outcome.first_token_seconds) / outcome.seconds,
        "output_tokens_per_second": outcome.output_tokens / outcome.seconds,
        "ttft_p50": p50,
        "ttft_p90": p90,
        "ttft_p99": p99,
        "preemptions": outcome.preemptions,
        "prompt_tokens": outcome.prompt_tokens,
    }


def show(title: str, rows: Sequence[dict[str, Any]]) -> None:
    table = Table(title=title)
    for heading in rows[0]:
        table.add_column(heading.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=160).print(table)


@click.command(help=str(__doc__).partition("\n")[0])
@click.option(
    "--lengths", "file", default=DATA / "workload_2000.csv", type=click.Path(path_type=Path), show_default=True
)
@click.option("--pools", default="60000,121060,229000", show_default=True, help="token slots, separated by commas")
@click.option("--request_rate", default=200.0, show_default=True, type=click.FloatRange(min=0, min_open=True))
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "admission.json", help="the JSON file")
def main(file: Path, pools: str, request_rate: float, out: Path) -> None:
    lengths = conversation_lengths(file)
    arrivals = np.cumsum(np.random.default_rng(0).exponential(1 / request_rate, len(lengths))).tolist()
    at_once, served = [], []
    for capacity in tqdm([int(size) for size in pools.split(",")], unit="pool"):
        at_once.append(pool_use(capacity, simulate(capacity, lengths)))
        served += [service(capacity, policy, simulate(capacity, lengths, arrivals, policy)) for policy in POLICIES]
    show(f"{file.name}, all at once", at_once)
    show(f"{file.name}, {request_rate:g} a second, {ASKED_FOR} tokens asked for", served)
    result = {
        "benchmark": "admission", "workload": file.name, "request_rate": request_rate, "asked_for": ASKED_FOR,
        **circumstances(None), "at_once": at_once, "served": served,
    }  # fmt: skip
    write_result(out, result)


if __name__ == "__main__":
    main()
