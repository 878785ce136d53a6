# SPDX-License-Identifier: Apache-2.0
"""Tokens a second of the embedded model on a CPU: the engine against llama.cpp, same GGUF file, prompts and threads.

    python -m perf.cpu_peer

llama.cpp comes prebuilt from npm (node-llama-cpp) into `--peer_dir`, so Node.js is needed. Both generate greedily past
any EOS, in turns, so that whatever else the machine does meets both; the ratio is that of the medians of all rounds.
The engine is a process of its own behind its EngineClient; llama.cpp is one behind a pipe.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from lightllm_backend.config import EngineConfig
from lightllm_backend.launch.embedded_model import MODEL_NAME, download_gguf, find_gguf
from perf.engine_under_test import engine_under_test
from perf.record import RESULTS, circumstances, write_result

PEER = "node-llama-cpp@3.22.1"
SCRIPT = Path(__file__).with_name("llama_cpp.mjs")

Prompts = list[tuple[int, ...]]

# Before each turn: the other's threads spin for a while before they sleep.
_PAUSE_SECONDS = 1.5


class LlamaCpp:
    """The peer, in a process of Node.js."""

    def __init__(self, folder: Path, model: Path, threads: int) -> None:
        install(folder)
        shutil.copy(SCRIPT, folder)
        command = ["node", SCRIPT.name, str(model.resolve()), str(threads)]
        self._process = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self.features: str = self._read()["features"]

    def seconds(self, prompts: Prompts, output_len: int) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompts": prompts, "outputLength": output_len}) + "\n")
        answer = self._read()
        assert answer["tokens"] == len(prompts) * output_len, "it must not end early"
        return float(answer["seconds"])

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise click.ClickException("llama.cpp has ended; its error is above")
        answer: dict[str, Any] = json.loads(line)
        return answer


def install(folder: Path) -> None:
    """Install the peer and its prebuilt library for this machine alone, without those for others."""
    if (folder / "node_modules" / "node-llama-cpp").is_dir():
        return
    folder.mkdir(parents=True, exist_ok=True)
    machine = {"x86_64": "x64", "aarch64": "arm64"}[os.uname().machine]
    library = f"@node-llama-cpp/linux-{machine}@{PEER.rpartition('@')[2]}"
    options = ["--omit=optional", "--ignore-scripts", "--no-audit", "--no-fund", "--silent"]
    subprocess.run(["npm", "install", "--prefix", str(folder), *options, PEER, library], check=True)


def compare(
    name: str, size: tuple[int, int, int], ours: Callable[[Prompts, int], float], peer: LlamaCpp, vocab_size: int,
    rounds: int,
) -> dict[str, Any]:  # fmt: skip
    """One row of the result. The first round is not counted. A single output token: the prompt's tokens count."""
    batch, input_len, output_len = size
    chooser = random.Random(batch)
    counted = batch * (output_len if output_len > 1 else input_len)
    measured: tuple[list[float], list[float]] = ([], [])
    for _ in tqdm(range(rounds + 1), desc=name, unit="round"):
        prompts = [tuple(chooser.choices(range(vocab_size), k=input_len)) for _ in range(batch)]
        for figures, seconds in zip(measured, (ours, peer.seconds), strict=True):
            time.sleep(_PAUSE_SECONDS)
            figures.append(counted / seconds(prompts, output_len))
    engine, theirs = (figures[1:] for figures in measured)
    row: dict[str, Any] = {"work": name, "batch": batch, "input_len": input_len, "output_len": output_len}
    row |= {"engine_rounds": engine, "llama_cpp_rounds": theirs}
    row |= {"engine_tokens_per_second": statistics.median(engine)}
    row |= {"llama_cpp_tokens_per_second": statistics.median(theirs)}
    row["ratio"] = row["engine_tokens_per_second"] / row["llama_cpp_tokens_per_second"]
    row["ratio_of_best"] = max(engine) / max(theirs)
    return row


@click.command(help=str(__doc__).partition("\n")[0])
@click.option("--batches", default="1,4,16", show_default=True, help="batch sizes, separated by commas")
@click.option("--input_len", default=64, show_default=True, type=click.IntRange(min=1))
@click.option("--output_len", default=64, show_default=True, type=click.IntRange(min=2))
@click.option("--prefill_len", default=512, show_default=True, type=click.IntRange(min=1), help="a prompt by itself")
@click.option("--rounds", default=9, show_default=True, type=click.IntRange(min=1), help="rounds that count")
@click.option("--peer_dir", type=click.Path(path_type=Path), help="where llama.cpp is or shall be installed")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "cpu_peer.json", help="the JSON file")
def main(
    batches: str, input_len: int, output_len: int, prefill_len: int, rounds: int, peer_dir: Path | None, out: Path
) -> None:
    threads = len(os.sched_getaffinity(0))
    load_before = os.getloadavg()
    works = [(f"decode, batch {size}", (int(size), input_len, output_len)) for size in batches.split(",")]
    works.append(("prefill", (1, prefill_len, 1)))
    config = EngineConfig(device="cpu", log_stats_interval=0.0, worker_python=sys.executable)
    with tempfile.TemporaryDirectory() as scratch:
        model = find_gguf() or download_gguf(Path(scratch), sys.executable)
        peer = LlamaCpp(peer_dir or Path(scratch), model, threads)
        try:
            with engine_under_test(config) as engine:
                vocab_size, dtype = engine.info.vocab_size, engine.info.dtype

                def ours(prompts: Prompts, count: int) -> float:
                    return engine.run_prompts(prompts, count).seconds

                rows = [compare(name, size, ours, peer, vocab_size, rounds) for name, size in works]
        finally:
            peer.close()
    table = Table(title=f"{MODEL_NAME}, {dtype}, {threads} threads, {input_len} prompt and {output_len} output tokens")
    for heading in ("", "engine tokens/s", "llama.cpp tokens/s", "ratio"):
        table.add_column(heading, justify="right")
    for row in rows:
        figures = (row["engine_tokens_per_second"], row["llama_cpp_tokens_per_second"])
        table.add_row(row["work"], *(f"{figure:.1f}" for figure in figures), f"{row['ratio']:.2f}")
    Console(width=100).print(table)
    result = {
        "benchmark": "cpu_peer", "model": MODEL_NAME, "dtype": dtype, "threads": threads, "peer_package": PEER,
        "peer_features": peer.features, "load_average": {"before": load_before, "after": os.getloadavg()},
        **circumstances(None), "rows": rows,
    }  # fmt: skip
    write_result(out, result)


if __name__ == "__main__":
    main()
