# SPDX-License-Identifier: Apache-2.0
"""What it costs that requests may be as long as the model allows, and how fast a long one is.

    python -m perf.long_context --model llama-3.1-8b --prompt 100000

Two engines, one after the other: with the default lengths, and with those that the other benchmarks have
(perf/shapes.py). Of each: the time to start, the memory by part, and the static inference test's steps of short
requests (see static_inference), which should not differ. The first also gets one long prompt: the time to its first
token, and then, since the prompt is cached, that of a decode step behind it. Other settings come from the environment.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from lightllm_backend.config import ENVIRONMENT_PREFIX, EngineConfig
from perf.cases import Case, SizeList
from perf.engine_under_test import EngineUnderTest, engine_under_test
from perf.record import RESULTS, circumstances, gpu_name, write_result
from perf.report.engine import long_context
from perf.shapes import LENGTHS, SHAPES
from perf.static_inference import measure

SHORT_PROMPT, SHORT_OUTPUT = 128, 128  # 192 tokens of context on average
LONG_OUTPUT = 65


def engine_config(directory: str, lengths: dict[str, int], given: dict[str, str | None]) -> EngineConfig:
    variables = {name: value for name, value in given.items() if value is not None}
    variables |= {"model_dir": directory, "load_format": "dummy", "log_stats_interval": "0"}
    variables |= {"worker_python": sys.executable} | {name: str(length) for name, length in lengths.items()}
    environment = {ENVIRONMENT_PREFIX + name.upper(): value for name, value in variables.items()}
    return EngineConfig.build({}, {**os.environ, **environment})


def measure_long(engine: EngineUnderTest, prompt_length: int, repeats: int) -> dict[str, float]:
    """The prompt is computed once and found in the prefix cache afterwards."""
    prompt = tuple(random.Random(0).choices(range(engine.info.vocab_size), k=prompt_length))
    prefill = engine.run_prompts([prompt], 1)
    runs = [(engine.run_prompts([prompt], 1), engine.run_prompts([prompt], LONG_OUTPUT)) for _ in range(repeats)]
    steps = [(whole.seconds - one.seconds) / (LONG_OUTPUT - 1) for one, whole in runs]
    device = [(whole.device_seconds - one.device_seconds) / (LONG_OUTPUT - 1) for one, whole in runs]
    return {
        "prompt_tokens": prompt_length,
        "prefill_seconds": prefill.seconds,
        "prefill_tokens_per_second": prompt_length / prefill.seconds,
        "cached_ms": 1e3 * statistics.median(one.seconds for one, _ in runs),
        "step_ms": 1e3 * statistics.median(steps),
        "device_step_ms": 1e3 * statistics.median(device),
    }


def run(config: EngineConfig, batches: Sequence[int], prompt_length: int | None, repeats: int) -> dict[str, Any]:
    """One row of the result."""
    with engine_under_test(config) as engine:
        info = engine.info
        row: dict[str, Any] = {
            "lengths": str(info.lengths), "max_total": info.lengths.max_total, "start_seconds": engine.start_seconds,
            "memory": info.memory, "pool_tokens": info.pool_tokens, "device": info.device, "dtype": info.dtype,
        }  # fmt: skip
        row["steps"] = [measure(engine, Case.equal(batch, SHORT_PROMPT, SHORT_OUTPUT), repeats) for batch in batches]
        if prompt_length is not None:
            row["long"] = measure_long(engine, prompt_length, repeats)
    return row


@click.command(help=str(__doc__).partition("\n")[0], context_settings={"max_content_width": 120})
@click.option("--model", type=click.Choice(list(SHAPES)), default="llama-3.1-8b", show_default=True)
@click.option("--prompt", default=100000, show_default=True, type=click.IntRange(min=1), help="tokens of the long one")
@click.option("--batches", default="1,8,64", show_default=True, type=SizeList(), help="of short requests")
@click.option("--repeats", default=3, show_default=True, type=click.IntRange(min=1), help="rounds that count")
@click.option("--device", help="auto | cuda | cpu")
@click.option("--out", type=click.Path(path_type=Path), help="the JSON file (default: in perf/results)")
def main(model: str, prompt: int, batches: list[int], repeats: int, out: Path | None, device: str | None) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "config.json").write_text(json.dumps(SHAPES[model]))
        for lengths, prompt_length in (({}, prompt), (LENGTHS, None)):
            config = engine_config(directory, lengths, {"device": device})
            rows.append(run(config, batches, prompt_length, repeats))
    gpu = gpu_name(rows[0]["device"])
    result = {"benchmark": "long_context", "model": model, "prompt": prompt, "repeats": repeats, **circumstances(gpu)}
    result |= {"rows": rows}
    Console(width=160).print("\n".join(long_context(result)), markup=False, soft_wrap=True)
    write_result(out or RESULTS / f"long_context_{model}_{gpu or 'cpu'}.json".replace(" ", "_").lower(), result)


if __name__ == "__main__":
    main()
