# SPDX-License-Identifier: Apache-2.0
"""What a long sequence holds of the KV pool if layers with a window give back what no query sees, with the real Router.

    python -m perf.window_slots

Once with the prefix cache, which keeps K and V of all tokens in all layers, and once without it, in layer groups: one
sequence alone, and as many at once as exact admission lets into a pool of a given size. No device is needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from lightllm_backend.kv_pool.layer_groups import LayerGroups
from lightllm_backend.kv_pool.storage import KVStorage
from lightllm_backend.request import Request, SamplingParams
from lightllm_backend.router.batch import StepResult
from lightllm_backend.router.router import Router
from perf.record import RESULTS, circumstances, write_result

GIB = 1 << 30
BATCH_MAX_TOKENS = 8192


class Shape(NamedTuple):
    windows: list[int]  # of each layer; 0: none
    num_kv_heads: int
    head_dim: int


SHAPES = {
    "Mistral 7B v0.1": Shape([4096] * 32, 8, 128),
    "Gemma 2 9B": Shape([0 if layer % 2 else 4096 for layer in range(42)], 8, 256),
    "Gemma 3 12B": Shape([0 if layer % 6 == 5 else 1024 for layer in range(48)], 8, 256),
}


class Simulation:
    """A Router whose sequences all have the same lengths, and the slots that they hold after each step."""

    def __init__(self, capacity: int, groups: LayerGroups, lengths: tuple[int, int], count: int) -> None:
        router = Router(
            capacity, count, BATCH_MAX_TOKENS, count, frozenset(), prefix_cache=groups.num_windowed == 0, groups=groups
        )
        self.used: list[int] = []  # a value a step: slots
        self.running = 0  # at most
        prompt, output = lengths
        for number in range(count):
            # Prompts differ from the first token on: nothing is shared.
            router.submit(Request(str(number), (number, *range(prompt - 1)), SamplingParams(max_tokens=output)))
        while (batch := router.next_batch()) is not None:
            stats = router.stats()
            self.used.append(groups.count * (stats.kv_tokens_used - stats.kv_tokens_cached))
            self.running = max(self.running, stats.running_requests)
            router.apply(batch, StepResult(np.full(int(batch.samples.sum()), 7, dtype=np.int32)))


def measure(shape: Shape, groups: LayerGroups, prompt: int, output: int, pool_bytes: int, count: int) -> dict[str, Any]:
    slot_bytes = KVStorage.slot_bytes(groups.layers_per_slot, shape.num_kv_heads, shape.head_dim, torch.bfloat16)
    capacity = pool_bytes // slot_bytes
    alone = Simulation(capacity, groups, (prompt, output), 1).used
    return {
        "groups": groups.count,
        "layers_per_slot": groups.layers_per_slot,
        "most_bytes": max(alone) * slot_bytes,
        "last_bytes": alone[-1] * slot_bytes,
        "at_once": Simulation(capacity, groups, (prompt, output), count).running,
    }


@click.command(help=str(__doc__).partition("\n")[0])
@click.option("--prompt", default=31744, show_default=True, type=click.IntRange(min=1), help="tokens")
@click.option("--output", default=1024, show_default=True, type=click.IntRange(min=2), help="tokens")
@click.option("--pool_gib", default=64, show_default=True, type=click.IntRange(min=1), help="of the sequences at once")
@click.option("--count", default=200, show_default=True, type=click.IntRange(min=1), help="most sequences at once")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "window_slots.json", help="the JSON file")
def main(prompt: int, output: int, pool_gib: int, count: int, out: Path) -> None:
    rows = []
    table = Table("model", "groups", "layers per slot", "most, GiB", "at its end, GiB", f"at once in {pool_gib} GiB")
    for name, shape in SHAPES.items():
        for groups in (LayerGroups.whole(len(shape.windows)), LayerGroups.of(shape.windows, prompt + output)):
            row = measure(shape, groups, prompt, output, pool_gib * GIB, count)
            rows.append({"model": name, "gives_back": groups.num_windowed > 0, **row})
            sizes = [f"{row[key] / GIB:.2f}" for key in ("most_bytes", "last_bytes")]
            table.add_row(name, str(row["groups"]), str(row["layers_per_slot"]), *sizes, str(row["at_once"]))
    Console(width=120).print(table)
    sizes = {"prompt": prompt, "output": output, "pool_gib": pool_gib, "batch_max_tokens": BATCH_MAX_TOKENS}
    write_result(out, {"benchmark": "window_slots", **sizes, **circumstances(None), "rows": rows})


if __name__ == "__main__":
    main()
