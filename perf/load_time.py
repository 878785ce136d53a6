# SPDX-License-Identifier: Apache-2.0
"""How long the weights of a large model take from disk to the GPU, and how much of the host's memory they take.

    python -m perf.load_time --model llama-7b

Writes a checkpoint of the shape with random weights (as safetensors shards) into a temporary folder, then loads it
twice, each time in a process of its own: the files are in the page cache then, as after a restart. The peak is of the
memory that is the process's own, beside the page cache and what PyTorch takes before it loads anything.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import click
import psutil
import torch
from safetensors.torch import save_file

from lightllm_backend import kernels
from lightllm_backend.models.causal_lm import model_class
from lightllm_backend.models.model_config import ModelConfig
from lightllm_backend.models.weights import load_weights
from lightllm_backend.parallel import TensorParallel
from perf.record import RESULTS, ROOT, circumstances, write_result
from perf.shapes import SHAPES

SHARD_BYTES = 4 << 30


def new_model(directory: str, device: torch.device) -> Any:
    config = ModelConfig.from_directory(directory)
    cls = model_class(config.architecture)
    return cls(config, kernels.select(device), TensorParallel(), torch.bfloat16, device, 4096)


def write_checkpoint(directory: str, device: torch.device) -> int:
    """Shards of random weights under the names and in the shapes that the model asks for; their bytes."""
    shard: dict[str, torch.Tensor] = {}
    size = total = number = 0
    slots = new_model(directory, torch.device("meta")).weight_map()
    for index, (name, slot) in enumerate(slots.items()):
        shard[name] = torch.randn(slot.full_shape, device=device).mul_(0.02).to(torch.bfloat16).cpu()
        size += shard[name].nbytes
        if size >= SHARD_BYTES or index == len(slots) - 1:
            save_file(shard, Path(directory, f"model-{number:05}.safetensors"))
            shard, total, size, number = {}, total + size, 0, number + 1
    files = {
        name: path.name
        for path in sorted(Path(directory).glob("*.safetensors"))
        for name in json.loads(_header(path))
        if name != "__metadata__"
    }
    Path(directory, "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return total


def _header(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))


def load_once(directory: str, device: torch.device) -> dict[str, float]:
    """Runs in a process of its own."""
    model = new_model(directory, device)
    process, peak, done = psutil.Process(), 0, threading.Event()

    def own_bytes() -> int:
        memory = process.memory_info()
        return int(memory.rss - memory.shared)

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.01):
            peak = max(peak, own_bytes())

    before, started = own_bytes(), time.monotonic()
    watcher = threading.Thread(target=watch)
    watcher.start()
    load_weights(model, directory, progress=False)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.monotonic() - started
    done.set()
    watcher.join()
    return {"seconds": seconds, "host_peak_bytes": max(peak, own_bytes()) - before}


@click.command(help=str(__doc__).partition("\n")[0])
@click.option("--model", type=click.Choice(list(SHAPES)), default="llama-7b", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="the JSON file (default: in perf/results)")
@click.option("--load", help="load this directory once and print what it took (how this program calls itself)")
def main(model: str, out: Path | None, load: str | None) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if load:
        print(json.dumps(load_once(load, device)))
        return
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "config.json").write_text(json.dumps(SHAPES[model]))
        size = write_checkpoint(directory, device)
        command = [sys.executable, "-m", "perf.load_time", "--load", directory]
        rows = [
            json.loads(subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout)
            for _ in range(2)
        ]
    for row in rows:
        gib = row["host_peak_bytes"] / 2**30
        print(f"{size / 1e9:.1f} GB in {row['seconds']:.1f} s, host peak {gib:.2f} GiB beyond the page cache")
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else None
    result = {"benchmark": "load_time", "model": model, "checkpoint_bytes": size, **circumstances(gpu), "rows": rows}
    machine = (gpu or "cpu").replace(" ", "_").lower()
    write_result(out or RESULTS / f"load_time_{model}_{machine}.json", result)


if __name__ == "__main__":
    main()
