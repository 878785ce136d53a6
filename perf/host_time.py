# SPDX-License-Identifier: Apache-2.0
"""What a step costs the host: the time until ModelRunner.launch returns, beside that until its tokens are there.

    python -m perf.host_time --model llama-7b

Steps of greedy decodes, of short prompts beside them, and of sampled decodes; with CUDA graphs and without. Nothing
overlaps here, contexts are short and no Router takes part, so the whole time is that of a step on an idle engine.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from lightllm_backend.config import EngineConfig
from lightllm_backend.engine.load import load_engine
from lightllm_backend.request import SamplingParams
from lightllm_backend.runner.model_runner import ModelRunner
from lightllm_backend.runner.warm_up import example_batch
from perf.record import RESULTS, circumstances, write_result
from perf.static_inference import SHAPES

GREEDY = SamplingParams()
SAMPLED = SamplingParams(do_sample=True, temperature=0.7, top_p=0.9, repetition_penalty=1.1)
# Decodes, prompts beside them, and how the tokens are chosen.
STEPS: list[tuple[int, list[int], SamplingParams]] = [
    (1, [], GREEDY), (64, [], GREEDY), (256, [], GREEDY), (1000, [], GREEDY), (256, [], SAMPLED),
    (0, [16], GREEDY), (0, [128], GREEDY), (0, [384], GREEDY), (8, [128], GREEDY), (64, [40, 60, 28], GREEDY),
    (64, [2000], GREEDY),
]  # fmt: skip


def measure(runner: ModelRunner, decodes: int, prompts: list[int], sampling: SamplingParams, repeats: int) -> list[Any]:
    """Medians in ms: until the launch returns, and until the result is there."""
    first = example_batch(decodes, prompts, sampling)
    runner.launch(first).result()
    batch = dataclasses.replace(first, admitted=())
    launches, steps = [], []
    for _ in range(repeats):
        started = time.perf_counter()
        pending = runner.launch(batch)
        launched = time.perf_counter()
        pending.result()
        launches.append(launched - started)
        steps.append(time.perf_counter() - started)
    return [1e3 * statistics.median(seconds) for seconds in (launches, steps)]


@click.command(help=str(__doc__).partition("\n")[0], context_settings={"max_content_width": 120})
@click.option("--model", type=click.Choice(list(SHAPES)), default="llama-7b", show_default=True, help="shape by name")
@click.option("--repeats", default=30, show_default=True, type=click.IntRange(min=1))
@click.option("--device", default="auto", show_default=True, help="auto | cuda | cpu")
@click.option("--out", type=click.Path(path_type=Path), help="the JSON file (default: in perf/results)")
def main(model: str, repeats: int, device: str, out: Path | None) -> None:
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch, "config.json").write_text(json.dumps(SHAPES[model]))
        engine = load_engine(EngineConfig(model_dir=scratch, load_format="dummy", device=device))
    load_seconds = time.perf_counter() - started
    runner = engine.runner
    rows = []
    for with_graphs in [True, False] if runner.graphs else [False]:
        if not with_graphs:
            runner.graphs = None
        for decodes, prompts, sampling in STEPS:
            launch_ms, step_ms = measure(runner, decodes, prompts, sampling, repeats)
            rows.append({
                "decodes": decodes, "prompts": prompts, "sampled": sampling is SAMPLED, "graphs": with_graphs,
                "launch_ms": launch_ms, "step_ms": step_ms,
            })  # fmt: skip
    table = Table(title=f"{model}, {engine.info.dtype} on {engine.info.device}")
    for heading in ("decodes", "prompts", "sampled", "graphs", "launch ms", "step ms"):
        table.add_column(heading, justify="right")
    for row in rows:
        *what, launch_ms, step_ms = row.values()
        table.add_row(*map(str, what), f"{launch_ms:.3f}", f"{step_ms:.3f}")
    Console(width=120).print(table)
    gpu = torch.cuda.get_device_name() if engine.info.device == "cuda" else None
    result = {
        "benchmark": "host_time", "model": model, "repeats": repeats, "load_seconds": load_seconds,
        **circumstances(gpu), "rows": rows,
    }  # fmt: skip
    write_result(out or RESULTS / f"host_time_{model}_{gpu or 'cpu'}.json".replace(" ", "_").lower(), result)


if __name__ == "__main__":
    main()
