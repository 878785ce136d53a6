# SPDX-License-Identifier: Apache-2.0
"""Writes what docs/capacity.md shows of the stored simulations: `python -m perf.capacity_page`.

These are its plots (needs matplotlib), its tables, and the data of the page that calculates costs.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click

from perf.capacity import SUSTAINED, best, cost, stored_capacities, stored_validation
from perf.record import RESULTS, ROOT
from perf.replica_choice import POLICIES
from perf.report.markdown import grid
from perf.report.simulations import capacity_table, validation_table

PAGE = ROOT / "docs" / "capacity.md"
FOLDER = ROOT / "docs" / "capacity"
SWEEP = "serving_llama-7b_workload_2000_sweep_nvidia_h200"
DRAWN = "llama-7b"  # whose plots the page shows
PRICE = 2.5  # dollars a GPU and hour, as an example
FIRST_TOKEN_SECONDS = 0.5
MARKERS = ("o", "s", "^", "D")
PANELS = {
    "requests/s that end, a replica": lambda row: row["requests_per_second"] / row["replicas"],
    "first token p99, ms": lambda row: 1e3 * (row["first_token_p99"] or math.inf),
    "prompt tokens found in the cache, %": lambda row: 100 * row["cached_share"],
}


def draw(result: dict[str, Any], rows: Sequence[dict[str, Any]], over: str, label: str, path: Path) -> None:
    """A panel for each of PANELS, a curve for each policy. over: the key of the x axis."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogFormatter

    from perf.step_plot import STYLE

    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(PANELS), figsize=(13, 4), layout="constrained")
        for axis, (title, value) in zip(axes, PANELS.items(), strict=True):
            for policy, marker in zip(POLICIES, MARKERS, strict=True):
                points = [row for row in rows if row["policy"] == policy]
                axis.plot([row[over] for row in points], list(map(value, points)), marker=marker, label=policy)
            axis.set(xlabel=label, ylabel=title)
            axis.grid(alpha=0.3)
        axes[1].set_yscale("log")
        for ticks in (axes[1].yaxis.set_major_formatter, axes[1].yaxis.set_minor_formatter):
            ticks(LogFormatter(minor_thresholds=(2, 0.5)))
        if over == "replicas":
            counts = sorted({row["replicas"] for row in rows})
            for axis in axes:
                axis.set_xscale("log")
                axis.set_xticks(counts, [str(count) for count in counts])
                axis.set_xticks([], minor=True)
        axes[0].legend()
        figure.suptitle(f"{result['model']} on {result['gpu']}", size=10)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)
    print(f"written to {path}")


def draw_all(results: Iterable[dict[str, Any]]) -> None:
    [result] = [one for one in results if one["model"] == DRAWN]
    for count, rows in groups(result, "replicas").items():
        if len({row["rate"] for row in rows}) > 2:
            label = f"requests a second and replica, {count} replicas"
            draw(result, rows, "rate", label, FOLDER / f"rates_{DRAWN}.svg")
    for rate, rows in groups(result, "rate").items():
        if len({row["replicas"] for row in rows}) > 2:
            label = f"replicas, {rate:g} requests a second each"
            draw(result, rows, "replicas", label, FOLDER / f"replicas_{DRAWN}.svg")


def groups(result: dict[str, Any], key: str) -> dict[Any, list[dict[str, Any]]]:
    values = sorted({row[key] for row in result["rows"]})
    return {value: [row for row in result["rows"] if row[key] == value] for value in values}


def data(results: Iterable[dict[str, Any]]) -> str:
    """The simulations as a script that any page may load: no request for data, so it works from a file too."""
    shown = ("replicas", "policy", "rate", "first_token_p99", "cached_share")
    shown += ("arrivals_per_second", "requests_per_second", "prompt_tokens_per_second", "output_tokens_per_second")
    models = [
        {"model": result["model"], "gpu": result["gpu"], "gpus": result["gpus"]}
        | {"rows": [{key: _short(row[key]) for key in shown} for row in result["rows"]]}
        for result in results
    ]
    head = "// SPDX-License-Identifier: Apache-2.0\n// Written by `python -m perf.capacity_page`. Do not edit.\n"
    return f"{head}const SUSTAINED = {SUSTAINED};\nconst CAPACITY = {json.dumps(models, indent=1)};\n"


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def tables(results: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """By the name of the place in the page."""
    found = {"validation": [*validation_table(stored_validation()), "", validation_errors()]}
    for result in results:
        found[f"rates of {result['model']}"] = capacity_table(result["rows"])
    rows = []
    for result in results:
        for row in best(result["rows"], FIRST_TOKEN_SECONDS):
            dollars = cost(row, result["gpus"], PRICE)
            policy = row["policy"] if row["replicas"] > 1 else "any"
            load = [str(row["replicas"]), policy, f"{row['rate']:g}", f"{1e3 * row['first_token_p99']:,.0f}"]
            rows.append([result["model"], str(result["gpus"]), *load, *(f"{one:.2f}" for one in dollars.values())])
    headings = ["model", "GPUs a replica", "replicas", "policy", "requests/s and replica", "first token p99, ms"]
    headings += ["$ for a million output tokens", "of all tokens"]
    found["cost"] = grid(headings, [row for row, before in zip(rows, [None, *rows], strict=False) if row != before])
    return found


def validation_errors() -> str:
    """How far the simulation is from the measured runs, in words."""
    rows = stored_validation()["rows"]

    def worst(name: str) -> str:
        return f"{max(abs(row[f'{name}_ratio'] - 1) for row in rows):.0%}"

    runs = json.loads((RESULTS / f"{SWEEP}.json").read_text())["runs"]
    responses = [run["output_tokens_per_second"] / run["tokens_per_response"] for run in runs[1:]]
    return (
        f"Requests a second differ by at most {worst('requests_per_second')}, mean times to the end of an answer by "
        f"{worst('end_to_end_mean')}, and the p99 of the first token by {worst('first_token_p99')}: the simulation is "
        f"too quick at {runs[1]['request_rate']:g} to {runs[-1]['request_rate']:g} requests/s. There the measured "
        f"server passed on {min(responses):,.0f} to {max(responses):,.0f} responses a second whatever the load, and "
        "put more tokens into each. This limit of the server's processes is not simulated. These runs are also older "
        "than the measured steps."
    )


def updated(text: str, results: Sequence[dict[str, Any]]) -> str:
    """The page with its tables written anew, each between its two comments."""
    for name, lines in tables(results).items():
        begin, end = f"<!-- table: {name} -->", "<!-- end of table -->"
        pattern = re.compile(f"({re.escape(begin)}\n).*?(?={end})", re.DOTALL)
        text = pattern.sub(lambda match, lines=lines: "\n".join([match[1], *lines, "", ""]), text)
    return text


@click.command(help=str(__doc__).partition("\n")[0])
def main() -> None:
    results = stored_capacities()
    FOLDER.mkdir(exist_ok=True)
    draw_all(results)
    (FOLDER / "data.js").write_text(data(results))
    PAGE.write_text(updated(PAGE.read_text(), results))


if __name__ == "__main__":
    main()
