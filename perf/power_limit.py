# SPDX-License-Identifier: Apache-2.0
"""A decode step for a moment and for seconds: what the GPU's limit of power costs, and how much energy a step takes.

    python -m perf.power_limit --model llama-7b --batches 1,64,128,256

A GPU counts its power over about a second, and lowers its clock when it has used too much. So the first steps after a
rest are quicker than those of a server that is busy. Clock and power are what nvidia-smi says at the end.
"""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from perf.cases import SizeList
from perf.decode_step import CONTEXT, DTYPE, DecodeStep
from perf.record import RESULTS, circumstances, write_result
from perf.shapes import SHAPES

REST_SECONDS, WARM_SECONDS, TIMED_SECONDS = 2.0, 2.0, 1.5
GRAPH_SECONDS = 0.05  # of steps in one graph, so that the host is never late


@torch.inference_mode()
def sustained_seconds(step: DecodeStep, batch: int, one: float) -> float:
    """Of a step that takes `one` second after a rest, when there have been nothing but such steps for a while."""
    forward, count = step.of(batch), max(1, int(GRAPH_SECONDS / one))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            forward()

    def run_for(seconds: float) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        until = time.perf_counter() + seconds
        start.record()
        graph.replay()
        replays = 1
        while time.perf_counter() < until:
            end.record()
            graph.replay()
            replays += 1
            end.synchronize()  # one replay is ahead
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / replays / count

    run_for(WARM_SECONDS)
    return run_for(TIMED_SECONDS)


def _device_state() -> dict[str, float]:
    fields = {"clocks.sm": "megahertz", "power.draw": "watts", "power.limit": "limit_watts"}
    command = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return dict(zip(fields.values(), map(float, printed.split(",")), strict=True))


def measure(step: DecodeStep, batch: int) -> dict[str, Any]:
    """One row of the result."""
    time.sleep(REST_SECONDS)
    [rested] = step.seconds([batch])
    sustained = sustained_seconds(step, batch, rested)
    state = _device_state()
    return {
        "batch": batch,
        "rested_ms": 1e3 * rested,
        "sustained_ms": 1e3 * sustained,
        **state,
        "joules": state["watts"] * sustained,
    }


def table_of(result: dict[str, Any]) -> Table:
    table = Table(title=f"{result['model']}, {result['context']} tokens of context, {result['machine']['gpu']}")
    for heading in ("batch", "ms after a rest", "ms sustained", "W", "limit, W", "MHz", "J a step"):
        table.add_column(heading, justify="right")
    for row in result["rows"]:
        table.add_row(
            str(row["batch"]), f"{row['rested_ms']:.3f}", f"{row['sustained_ms']:.3f}", f"{row['watts']:.0f}",
            f"{row['limit_watts']:.0f}", f"{row['megahertz']:.0f}", f"{row['joules']:.2f}",
        )  # fmt: skip
    return table


@click.command(help=str(__doc__).partition("\n")[0], context_settings={"max_content_width": 120})
@click.option("--model", type=click.Choice(list(SHAPES)), default="llama-7b", show_default=True, help="shape by name")
@click.option("--batches", default="1,8,32,64,128,256", show_default=True, type=SizeList(), help="batch sizes")
@click.option("--out", type=click.Path(path_type=Path), help="the JSON file (default: in perf/results)")
def main(model: str, batches: list[int], out: Path | None) -> None:
    if not torch.cuda.is_available():
        raise click.UsageError("PyTorch finds no GPU")
    step = DecodeStep(model, max(batches))
    rows = [measure(step, batch) for batch in tqdm(batches, desc=model, unit="batch")]
    gpu = torch.cuda.get_device_name()
    result = {
        "benchmark": "power_limit",
        "model": model,
        **circumstances(gpu),
        "dtype": str(DTYPE).removeprefix("torch."),
        "context": CONTEXT,
        "rows": rows,
    }
    Console(width=120).print(table_of(result))
    name = "_".join(["power_limit", model, *gpu.split()]).lower()
    write_result(out or RESULTS / f"{name}.json", result)


if __name__ == "__main__":
    main()
