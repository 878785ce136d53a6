# SPDX-License-Identifier: Apache-2.0
"""How soon the first token comes where requests share a long system prompt, with the prefix cache and without.

    python -m perf.prefix_cache --model llama-7b --shared 2000

Each prompt is the shared beginning and some random tokens of its own. First the requests come one by one, so the time
of each is its time to first token; then many at once, timed until each has its first token. Each round has a beginning
of its own, the first round does not count, and medians are told. Through the EngineClient, without Triton server; other
settings come from the environment.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from lightllm_backend.config import ENVIRONMENT_PREFIX, EngineConfig
from perf.engine_under_test import EngineUnderTest, engine_under_test
from perf.record import RESULTS, circumstances, gpu_name, write_result
from perf.shapes import SHAPES


def measure(engine: EngineUnderTest, shared: int, own: int, burst: int, repeats: int) -> dict[str, float]:
    chooser = random.Random(0)

    def seconds(count: int) -> float:
        prompts = [beginning + tuple(chooser.choices(vocabulary, k=own)) for _ in range(count)]
        return engine.run_prompts(prompts, output_len=1).seconds

    vocabulary = range(engine.info.vocab_size)
    one_by_one, at_once = [], []
    for repeat in range(repeats + 1):
        beginning = tuple(chooser.choices(vocabulary, k=shared))
        first, second, together = seconds(1), seconds(1), seconds(burst)
        if repeat > 0:
            one_by_one.append((first, second))
            at_once.append(together)
    firsts, seconds_ = zip(*one_by_one, strict=True)
    return {
        "first_ms": 1e3 * statistics.median(firsts),
        "next_ms": 1e3 * statistics.median(seconds_),
        "burst_ms": 1e3 * statistics.median(at_once),
    }


def engine_config(directory: str, prefix_cache: bool, longest: int, given: dict[str, str | None]) -> EngineConfig:
    variables = {name: value for name, value in given.items() if value is not None}
    variables |= {"model_dir": directory, "log_stats_interval": "0", "worker_python": sys.executable}
    variables |= {"max_req_input_len": str(longest), "max_req_total_len": str(longest + 1)}
    variables |= {"prefix_cache": str(prefix_cache).lower()}
    environment = {ENVIRONMENT_PREFIX + name.upper(): value for name, value in variables.items()}
    return EngineConfig.build({}, {**os.environ, **environment})


@click.command(help=str(__doc__).partition("\n")[0], context_settings={"max_content_width": 120})
@click.option("--model", type=click.Choice(list(SHAPES)), default="llama-7b", show_default=True, help="shape by name")
@click.option(
    "--shared", default=2000, show_default=True, type=click.IntRange(min=1), help="tokens that all begin with"
)
@click.option("--own", default=48, show_default=True, type=click.IntRange(min=1), help="tokens behind them")
@click.option("--burst", default=32, show_default=True, type=click.IntRange(min=1), help="requests that come at once")
@click.option("--repeats", default=5, show_default=True, type=click.IntRange(min=1), help="rounds that count")
@click.option("--device", help="auto | cuda | cpu")
@click.option("--max_total_token_num", help="token slots of the KV pool")
@click.option("--out", type=click.Path(path_type=Path), help="the JSON file (default: in perf/results)")
def main(model: str, shared: int, own: int, burst: int, repeats: int, out: Path | None, **settings: str | None) -> None:
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch, "config.json").write_text(json.dumps(SHAPES[model]))
        for prefix_cache in (False, True):
            config = engine_config(scratch, prefix_cache, shared + own, settings | {"load_format": "dummy"})
            with engine_under_test(config) as engine:
                rows.append({"prefix_cache": prefix_cache, **measure(engine, shared, own, burst, repeats)})
    table = Table(title=f"{model}, {engine.info.dtype}: {shared} shared prompt tokens and {own} of its own, ms")
    for heading in ("prefix cache", "first request", "next request", f"{burst} at once, all first tokens"):
        table.add_column(heading, justify="right")
    for row in rows:
        prefix_cache, *times = row.values()
        table.add_row("yes" if prefix_cache else "no", *(f"{milliseconds:.1f}" for milliseconds in times))
    Console(width=120).print(table)
    gpu = gpu_name(engine.info.device)
    result = {
        "benchmark": "prefix_cache", "model": model, "shared": shared, "own": own, "burst": burst, "repeats": repeats,
        **circumstances(gpu), "rows": rows,
    }  # fmt: skip
    write_result(out or RESULTS / f"prefix_cache_{model}_{gpu or 'cpu'}.json".replace(" ", "_").lower(), result)


if __name__ == "__main__":
    main()
