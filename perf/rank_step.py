# SPDX-License-Identifier: Apache-2.0
"""What a decode step on several GPUs has beyond its share of one GPU's step, part by part of a layer.

    python -m perf.rank_step --tp 2 --batches 1,128
    python -m perf.rank_step --model llama-2-70b --layers 4

Steps of a model of random weights with a few layers, in a CUDA graph without an engine: on one GPU, then on all ranks,
one process each. A kernel counts from the end of those before it to its own end, so that the parts add up to the
step although kernels overlap; the recording makes a step somewhat longer than the time beside it, measured without.
"""

from __future__ import annotations

import os
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch

from lightllm_backend.config import EngineConfig
from lightllm_backend.generation.worker_group import worker_environment
from lightllm_backend.parallel import TensorParallel
from lightllm_backend.runner.compile_ahead import compile_ahead
from perf.cases import SizeList
from perf.decode_step import DTYPE, DecodeStep
from perf.record import RESULTS, circumstances, write_result
from perf.report.engine import rank_step
from perf.shapes import SHAPES
from perf.static_inference import WEIGHT_DTYPES
from perf.step_profile import Activity, activities_of

QKV, ATTENTION, OUTPUT, NORM, MLP, REST = (
    "q, k and v", "attention", "attention's output", "norms, with their sums", "gate, up and down",
    "embedding, head and the rest",
)  # fmt: skip
STEPS = 8


def parts_of(activities: Sequence[Activity], layers: int, steps: int) -> dict[str, float]:
    """µs of each part in a layer, of REST in a step; a layer's parts are told by the norms and attention between."""
    times: dict[str, float] = defaultdict(float)
    norms, part, last = 0, REST, activities[0].start
    for name, _, end in sorted(activities, key=lambda one: one.end):
        if "rms_norm" in name:
            here = NORM
            part = REST if norms == 2 * layers else MLP if norms % 2 else QKV
            norms = (norms + 1) % (2 * layers + 1)
        elif "attention" in name or "merge_splits" in name:
            here, part = ATTENTION, OUTPUT
        else:
            here = part
        times[here] += max(0.0, end - last)
        last = max(last, end)
    return {name: time / steps / (1 if name == REST else layers) for name, time in times.items()}


@torch.inference_mode()
def measure(step: DecodeStep, batch: int, layers: int, records: bool) -> dict[str, Any]:
    """One column of the table; every rank of a step must call it, one of them records."""
    seconds = step.seconds([batch])[0]
    run = step.of(batch)
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()

    def replay() -> None:
        for _ in range(STEPS + 1):
            graph.replay()

    if not records:
        replay()
        torch.cuda.synchronize()
        return {}
    activities = activities_of(replay)
    of_step, remaining = divmod(len(activities), STEPS + 1)
    assert remaining == 0, "each replay has the same kernels"
    # In the first, ranks wait for the one that begins last.
    return {"step_ms": 1e3 * seconds, "parts": parts_of(activities[of_step:], layers, STEPS)}


@torch.inference_mode()
def compile_steps(step: DecodeStep, batches: Sequence[int]) -> None:
    compile_ahead(lambda: [step.of(batch)() for batch in batches])


def run_rank(
    rank: int, model: str, tp: int, batches: Sequence[int], layers: int, weight_dtype: str, meeting: str, out: str
) -> None:
    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    ranks = TensorParallel.connect(rank, tp, device, meeting)
    most = max(batches)
    rows: list[dict[str, Any]] = [{"batch": batch} for batch in batches]
    if rank == 0:
        activities_of(lambda: torch.zeros(1, device="cuda"))  # the first recording sets the profiler up
        step = DecodeStep(model, most, weight_dtype, layers=layers)
        compile_steps(step, batches)
        for row in rows:
            row["one"] = measure(step, row["batch"], layers, records=True)
        del step
        torch.cuda.empty_cache()
    ranks.minimum(0, device)
    parallel = ranks.with_symmetric_memory(most, SHAPES[model]["hidden_size"], DTYPE, device)
    step = DecodeStep(model, most, weight_dtype, parallel=parallel, layers=layers)
    compile_steps(step, batches)
    for row in rows:
        row["ranks"] = measure(step, row["batch"], layers, records=rank == 0)
    if rank == 0:
        result = {
            "benchmark": "rank_step", "model": model, **circumstances(torch.cuda.get_device_name()),
            "dtype": "bfloat16", "weight_dtype": weight_dtype, "tp": tp, "layers": layers, "rows": rows,
        }  # fmt: skip
        write_result(Path(out), result)
        print("\n".join(rank_step(result)))
    ranks.minimum(0, device)


@click.command(help=str(__doc__).partition("\n")[0])
@click.option("--model", type=click.Choice(list(SHAPES)), default="llama-7b", show_default=True, help="shape by name")
@click.option("--tp", default=2, show_default=True, type=click.IntRange(min=2), help="GPUs that share the model")
@click.option("--batches", default="1,32,128,256", show_default=True, type=SizeList(), help="batch sizes")
@click.option("--layers", default=8, show_default=True, type=click.IntRange(min=1), help="of the model's")
@click.option("--weight_dtype", type=click.Choice(WEIGHT_DTYPES), default="auto", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="the JSON file (default: in perf/results)")
def main(model: str, tp: int, batches: list[int], layers: int, weight_dtype: str, out: Path | None) -> None:
    os.environ.update(worker_environment(EngineConfig()))
    bits = [] if weight_dtype == "auto" else [weight_dtype]
    name = "_".join(["rank_step", model, f"tp{tp}", *bits, *torch.cuda.get_device_name().split()]).lower()
    with tempfile.TemporaryDirectory() as directory:
        arguments = (model, tp, batches, layers, weight_dtype, f"{directory}/ranks", out or RESULTS / f"{name}.json")
        torch.multiprocessing.spawn(run_rank, arguments, nprocs=tp)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
