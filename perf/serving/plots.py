# SPDX-License-Identifier: Apache-2.0
"""Plots of a result, beside its JSON file: `python -m perf.serving.plots perf/results/serving_*.json`.

Latency over throughput for a result of several request rates; for each run a timeline of the engine: running and
queued requests, and the tokens of the KV pool.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import click
import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogFormatter

LATENCY_PANELS = {
    "time_to_first_token": "time to first token, ms",
    "time_per_output_token": "time per output token, ms",
    "end_to_end": "end to end, ms",
}
PERCENTILES = ("p50", "p90", "p99")
NO_METADATA = {"Software": None}  # so that the same result makes the same file


def write_plots(path: Path) -> list[Path]:
    result = json.loads(path.read_text())
    written = []
    if len(result["runs"]) > 1:
        written.append(_write(path.with_suffix(".sweep.png"), latency_over_throughput(result)))
    for run in result["runs"]:
        if run["timeline"]:
            rate = f".{run['request_rate'] or math.inf:g}" if len(result["runs"]) > 1 else ""
            written.append(_write(path.with_suffix(f".timeline{rate}.png"), timeline(result, run)))
    return written


def latency_over_throughput(result: dict[str, Any]) -> Any:
    panels = {key: label for key, label in LATENCY_PANELS.items() if result["runs"][0].get(key)}
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4), squeeze=False, layout="constrained")
    throughput = [run["output_tokens_per_second"] for run in result["runs"]]
    for axis, (key, label) in zip(axes[0], panels.items(), strict=True):
        for percentile in PERCENTILES:
            axis.plot(throughput, [1e3 * run[key][percentile] for run in result["runs"]], marker="o", label=percentile)
        for run, tokens in zip(result["runs"], throughput, strict=True):
            point, rate = (tokens, 1e3 * run[key]["p50"]), run["request_rate"] or math.inf
            axis.annotate(f"{rate:g}/s", point, textcoords="offset points", xytext=(2, -11), size=8)
        axis.set(xlabel="output tokens/s", ylabel=label, xlim=(0, None), yscale="log")
        for ticks in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            ticks(LogFormatter())  # 20, not 2 x 10^1
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(title(result), size=10)
    return figure


def timeline(result: dict[str, Any], run: dict[str, Any]) -> Any:
    figure, (requests, tokens) = plt.subplots(2, 1, figsize=(9, 6), sharex=True, layout="constrained")
    moments = run["timeline"]
    at = [moment["at"] for moment in moments]
    for key in ("running", "queued"):
        requests.plot(at, [moment[f"{key}_requests"] for moment in moments], label=key)
    for key, label in (("used", "in use"), ("cached", "only cached"), ("total", "capacity")):
        values = [moment[f"kv_tokens_{key}"] for moment in moments]
        if any(values):
            tokens.plot(at, values, label=label, linestyle="--" if key == "total" else "-")
    requests.set(ylabel="requests", ylim=(0, None))
    tokens.set(xlabel="seconds", ylabel="KV tokens", ylim=(0, None))
    for axis in (requests, tokens):
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(f"{title(result)}, {rate_of(run)}", size=10)
    return figure


def rate_of(run: dict[str, Any]) -> str:
    return f"{run['request_rate']:g} requests/s" if run["request_rate"] else "all at once"


def title(result: dict[str, Any]) -> str:
    settings = ", ".join(f"{name} {value}" for name, value in result["settings"].items())
    where = result["machine"]["gpu"] or result["machine"]["cpu"]
    return ", ".join(filter(None, [result["model"], settings, result["workload"], where]))


def _write(path: Path, figure: Any) -> Path:
    figure.savefig(path, dpi=100, metadata=NO_METADATA)
    plt.close(figure)
    print(f"written to {path}")
    return path


@click.command(help=str(__doc__).partition("\n")[0])
@click.argument("results", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
def main(results: tuple[Path, ...]) -> None:
    for path in results:
        write_plots(path)


if __name__ == "__main__":
    main()
