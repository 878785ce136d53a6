# SPDX-License-Identifier: Apache-2.0
"""The figures of a run for the terminal, and what must be said about them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from rich.table import Table

LATENCIES = {
    "time to first token": "time_to_first_token",
    "time per output token": "time_per_output_token",
    "between responses": "inter_token",
    "end to end": "end_to_end",
    "behind the engine": "delivery_lag",
}


COLUMNS = ("mean", "p50", "p90", "p99")


def figures_table(run: dict[str, Any]) -> Table:
    rate = run["request_rate"] or math.inf
    table = Table(title=f"{run['requests']} requests at {rate:g} a second: {run['seconds']:.2f} s")
    for heading in ("", *COLUMNS):
        table.add_column(heading, justify="right")
    for name, key in LATENCIES.items():
        if figures := run.get(key):
            table.add_row(f"{name}, ms", *(f"{1e3 * figures[column]:,.2f}" for column in COLUMNS))
    table.add_section()
    for name, key in (
        ("requests/s", "requests_per_second"),
        ("output tokens/s", "output_tokens_per_second"),
        ("prompt and output tokens/s", "total_tokens_per_second"),
        ("tokens a response", "tokens_per_response"),
    ):
        table.add_row(name, f"{run[key]:,.2f}")
    if run["pool_share_while_queued"] is not None:
        table.add_row("KV pool in use while requests wait", f"{run['pool_share_while_queued']:.1%}")
    if run["device_share"] is not None:
        table.add_row("the device computes", f"{run['device_share']:.1%} of the time")
    return table


def notes(run: dict[str, Any]) -> Iterator[str]:
    clients = run["clients"]
    number = clients["processes"]
    late, late_sending = 1e3 * clients["loop_lag_p99"], 1e3 * clients["send_lag_p99"]
    yield (
        f"{number} client process{'es' * (number > 1)}: the busiest computed {clients['cpu_share']:.0%} of its time; "
        f"p99 of the latest: {late:.1f} ms late in its loop, {late_sending:.1f} ms in sending"
    )
    if clients["were_the_limit"]:
        yield "WARNING: the clients may have been the limit, and these figures theirs; more --processes or cores help"
