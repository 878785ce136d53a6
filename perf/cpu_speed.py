# SPDX-License-Identifier: Apache-2.0
"""Tokens a second on a CPU: the engine against transformers' `generate`, same model, dtype, prompts and threads.

    python -m perf.cpu_speed --batches 1,16

Both generate greedily past any EOS, in turns, so that whatever else the machine does meets both; medians of the rounds.
The engine is a process of its own behind its EngineClient, so its figures include sockets, Router and sampler.
"""

from __future__ import annotations

import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

# For both alike, before torch is imported: threads that spin at barriers slow each other down on shared cores.
os.environ["OMP_WAIT_POLICY"] = "passive"

import click
import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from lightllm_backend.config import EngineConfig
from lightllm_backend.launch.embedded_model import MODEL_NAME, embedded_model_directory
from perf.engine_under_test import EngineUnderTest, engine_under_test
from perf.record import RESULTS, circumstances, write_result


class Transformers:
    """The peer, in this process."""

    def __init__(self, directory: str, dtype: str) -> None:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self._model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()
        self._model.generation_config.eos_token_id = None
        self._model.generation_config.pad_token_id = 0

    @torch.inference_mode()
    def seconds(self, prompts: list[tuple[int, ...]], output_len: int) -> float:
        ids = torch.tensor(prompts)
        started = time.perf_counter()
        output = self._model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=output_len, do_sample=False
        )
        seconds = time.perf_counter() - started
        assert output.shape[1] == ids.shape[1] + output_len, "it must not end early"
        return seconds


def measure(
    engine: EngineUnderTest, peer: Transformers, batch: int, input_len: int, output_len: int, rounds: int
) -> dict[str, Any]:
    """One row of the result; the first round of each is not counted."""
    vocabulary = range(engine.info.vocab_size)
    chooser = random.Random(batch)
    ours, theirs = [], []
    for _ in tqdm(range(rounds + 1), desc=f"batch {batch}", unit="round"):
        prompts = [tuple(chooser.choices(vocabulary, k=input_len)) for _ in range(batch)]
        ours.append(batch * output_len / engine.run_prompts(prompts, output_len).seconds)
        theirs.append(batch * output_len / peer.seconds(prompts, output_len))
    row: dict[str, Any] = {"batch": batch, "engine_rounds": ours[1:], "transformers_rounds": theirs[1:]}
    row["engine_tokens_per_second"] = statistics.median(ours[1:])
    row["transformers_tokens_per_second"] = statistics.median(theirs[1:])
    row["ratio"] = row["engine_tokens_per_second"] / row["transformers_tokens_per_second"]
    return row


@click.command(help=str(__doc__).partition("\n")[0])
@click.option("--model_dir", help="a Hugging Face directory (default: the embedded model)")
@click.option("--batches", default="1,16", show_default=True, help="batch sizes, separated by commas")
@click.option("--input_len", default=64, show_default=True, type=click.IntRange(min=1))
@click.option("--output_len", default=64, show_default=True, type=click.IntRange(min=1))
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(min=1), help="rounds that count")
@click.option("--dtype", default="auto", show_default=True, help="auto: what the engine takes for the fastest")
@click.option("--weight_dtype", default="auto", show_default=True, help="of the engine; transformers has floats")
@click.option("--out", type=click.Path(path_type=Path), help="the JSON file")
def main(
    model_dir: str | None,
    batches: str,
    input_len: int,
    output_len: int,
    rounds: int,
    dtype: str,
    weight_dtype: str,
    out: Path | None,
) -> None:
    directory = model_dir or str(embedded_model_directory())
    config = EngineConfig(
        model_dir=directory,
        device="cpu",
        dtype=dtype,
        weight_dtype=weight_dtype,
        log_stats_interval=0.0,
        worker_python=sys.executable,
    )
    with engine_under_test(config) as engine:
        peer = Transformers(directory, engine.info.dtype)
        rows = [measure(engine, peer, int(size), input_len, output_len, rounds) for size in batches.split(",")]
    name = Path(model_dir).name if model_dir else MODEL_NAME
    title = (
        f"{name}, {engine.info.dtype}, {torch.get_num_threads()} threads, {input_len} prompt and {output_len} output"
    )
    table = Table(title=title)
    for heading in ("batch", "engine tokens/s", "transformers tokens/s", "ratio"):
        table.add_column(heading, justify="right")
    for row in rows:
        figures = (row["engine_tokens_per_second"], row["transformers_tokens_per_second"])
        table.add_row(str(row["batch"]), *(f"{figure:.1f}" for figure in figures), f"{row['ratio']:.2f}")
    Console(width=100).print(table)
    result = {
        "benchmark": "cpu_speed", "model": name, "dtype": engine.info.dtype,
        "weight_dtype": weight_dtype, "threads": torch.get_num_threads(),
        "input_len": input_len, "output_len": output_len, **circumstances(None), "rows": rows,
    }  # fmt: skip
    types = "" if weight_dtype == "auto" else f"_{weight_dtype}"
    write_result(out or RESULTS / f"cpu_speed{types}.json", result)


if __name__ == "__main__":
    main()
