# SPDX-License-Identifier: Apache-2.0
"""The report's sections on the Router's own time, and on simulations in which it runs with an engine of known times."""

from __future__ import annotations

from collections.abc import Iterable

from perf.report.markdown import Result, grid, origin, section, table


def router_time(result: Result) -> list[str]:
    columns = [
        ("admission", "{admission}"), ("running", "{running:,.0f}"), ("queued", "{queued:,}"),
        ("Router, ms, p50", "{router_ms_p50:.3f}"), ("p99", "{router_ms_p99:.3f}"),
        ("EngineServer, ms, p50", "{server_ms_p50:.3f}"), ("p99", "{server_ms_p99:.3f}"),
    ]  # fmt: skip
    return section("Host time a step", origin(result), table(columns, result["rows"]))


def admission(result: Result) -> list[str]:
    at_once = [
        ("token slots", "{pool_tokens:,}"), ("steps", "{steps:,}"), ("running", "{running:,.0f}"),
        ("slots with a live token, by step", "{share_by_step:.1%}"), ("by time", "{share_by_time:.1%}"),
    ]  # fmt: skip
    served = [
        ("token slots", "{pool_tokens:,}"), ("admission", "{policy}"), ("pool use", "{share_by_time:.0%}"),
        ("running", "{running:,.0f}"),
        ("requests/s", "{requests_per_second:.1f}"), ("output tokens/s", "{output_tokens_per_second:,.0f}"),
        ("TTFT p50, s", "{ttft_p50:.1f}"), ("p90", "{ttft_p90:.1f}"),
        ("preemptions", "{preemptions:,}"), ("prompt tokens computed", "{prompt_tokens:,}"),
    ]  # fmt: skip
    asked_for = f"{result['asked_for']:,} tokens asked for, ended at the true length"
    return section(
        f"Simulated: {result['workload']} at once, lengths known, until the queue is empty",
        origin(result),
        table(at_once, result["at_once"]),
        [f"**Simulated: {result['workload']} at {result['request_rate']:g} requests/s, {asked_for}**:"],
        table(served, result["served"]),
    )


def window_slots(result: Result) -> list[str]:
    cells = [
        [
            row["model"],
            "yes" if row["gives_back"] else "no",
            f"{row['groups']} of {row['layers_per_slot']} layers",
            *(f"{row[name] / 2**30:.2f}" for name in ("most_bytes", "last_bytes")),
            f"{row['at_once']:,}",
        ]
        for row in result["rows"]
    ]
    title = f"K and V of a sequence of {result['prompt']:,} + {result['output']:,} tokens, simulated"
    headings = ["model", "gives back", "groups", "most, GiB", "at its end, GiB", f"at once in {result['pool_gib']} GiB"]
    return section(title, origin(result), grid(headings, cells))


def fairness(result: Result) -> list[str]:
    columns = [
        ("flood of", "{flood}"), ("case", "{case}"), ("step, ms", "{step_ms:.1f}"),
        ("first token, s, p50", "{first_p50_s:.2f}"), ("p99", "{first_p99_s:.2f}"),
        ("end, s, p50", "{p50_s:.2f}"), ("p99", "{p99_s:.2f}"),
        ("steps, p50", "{steps_p50:.0f}"), ("p99", "{steps_p99:.0f}"),
        ("output tokens/s, all", "{output_tokens_per_second:,.0f}"),
    ]  # fmt: skip
    first = result["rows"][0]
    alone = f"alone: first token after {first['alone_first_s']:.3f} s, end after {first['alone_s']:.2f} s and "
    alone += f"{first['alone_steps']} steps"
    title = f"Simulated: {result['singles']} single requests, one after another, beside a flood"
    return section(title, f"{origin(result)}; {alone}", table(columns, result["rows"]))


def capacity(result: Result) -> list[str]:
    gpus = "one" if result["gpus"] == 1 else result["gpus"]
    title = f"Simulated: chats on replicas of {result['model']}, steps of {gpus} {result['gpu']}"
    return section(title, origin(result), capacity_table(result["rows"]))


def capacity_table(rows: Iterable[Result]) -> list[str]:
    """Replicas by policy and load, as in docs/capacity.md."""
    columns = [
        ("replicas", "{replicas}"), ("policy", "{policy}"), ("asked requests/s and replica", "{rate:g}"),
        ("arrived requests/s", "{arrivals_per_second:,.1f}"), ("ended", "{requests_per_second:,.1f}"),
        ("output tokens/s", "{output_tokens_per_second:,.0f}"),
        ("first token p50, ms", "{first_token_p50:,.0f}", "later"), ("p99", "{first_token_p99:,.0f}", "later"),
        ("per output token p50, ms", "{per_output_token_p50:.1f}"), ("prompt tokens cached", "{cached_share:.0%}"),
        ("busiest replica, of an even share", "{busiest:.2f}"),
    ]  # fmt: skip
    times = ("first_token_p50", "first_token_p99", "per_output_token_p50")
    return table(columns, (row | {name: 1e3 * row[name] for name in times if row[name] is not None} for row in rows))


def capacity_validation(result: Result) -> list[str]:
    title = "LLaMA-7B's service, measured and simulated"
    return section(title, origin(result), validation_table(result))


def validation_table(result: Result) -> list[str]:
    """A service's measured figures beside the simulated ones, as in docs/capacity.md."""
    figures = {
        "requests/s": ("requests_per_second", 1, "{:.1f}"), "first token p50, ms": ("first_token_p50", 1e3, "{:,.0f}"),
        "p99": ("first_token_p99", 1e3, "{:,.0f}"), "end to end mean, s": ("end_to_end_mean", 1, "{:.2f}"),
    }  # fmt: skip
    rows = []
    for row in result["rows"]:
        cells = [row["workload"], f"{row['rate']:g}" if row["rate"] else "all at once"]
        for name, factor, layout in figures.values():
            cells += [layout.format(factor * row[f"{name}_{source}"]) for source in ("measured", "simulated")]
        rows.append(cells)
    headings = [name for figure in figures for name in (f"{figure}, measured", "simulated")]
    return grid(["workload", "asked requests/s", *headings], rows)
