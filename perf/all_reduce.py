# SPDX-License-Identifier: Apache-2.0
"""How long an all-reduce takes between GPUs: NCCL's, and those over symmetric memory, for the messages of decode steps.

    python -m perf.all_reduce --ranks 2

Starts one process a rank. Each way of summing is captured in a CUDA graph, several in a row as in a model's step, and
its result is checked. A column is microseconds for one sum: the median over replays of the slowest rank's time.
`one_shot` and `two_shot` make new tensors; `two_shot_in_place` leaves the sum where the next message overwrites it;
`engine` is TensorParallel.all_reduce as the engine calls it, on a product that is in the buffer already. `norm_after`
is that and the norm that follows; `norm_one_shot` and `norm_two_shots` are norms that sum through Lamport buffers;
`norm_engine` is the one of both that the engine takes. `gather_nccl` and `gather_engine` put the ranks' messages side
by side instead.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lightllm_backend.config import EngineConfig
from lightllm_backend.generation.worker_group import worker_environment
from lightllm_backend.kernels import launchers
from lightllm_backend.kernels.collective.lamport_buffers import LamportBuffers
from lightllm_backend.parallel import TensorParallel
from perf.record import RESULTS, ROOT, circumstances, write_result

IN_A_ROW = 20
REPLAYS = 50
HIDDEN = 4096  # a message is rows of it
SIZES = [8 << 10 << step for step in range(12)]  # bytes: 8 KB … 16 MB


def ways_of(parallel: TensorParallel, message: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Each sums what is in `message`, or in the symmetric buffer, where that is."""

    def nccl() -> Tensor:
        torch.distributed.all_reduce(message)
        return message

    ways: dict[str, Callable[[], Tensor]] = {"nccl": nccl}
    view = parallel.product_buffer(*message.shape, message.dtype)
    if parallel.symmetric is not None and view is not None:
        symmetric, buffer = parallel.symmetric, view
        ways |= {
            "one_shot": lambda: symmetric.one_shot(buffer),
            "two_shot": lambda: symmetric.two_shot(buffer),
            "two_shot_in_place": lambda: symmetric.two_shot_in_place(buffer),
            "engine": lambda: parallel.all_reduce(buffer),
        }
    return ways


def norms_of(parallel: TensorParallel, message: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The same with the addition to a residual and its norm, and gathering; only where there are Lamport buffers."""
    weight, residual = torch.ones_like(message[0]), torch.zeros_like(message)
    view = parallel.product_buffer(*message.shape, message.dtype)
    buffers = parallel.lamport_buffers(*message.shape)
    if view is None or buffers is None:
        return {}

    def after() -> Tensor:
        return launchers.rms_norm(parallel.all_reduce(view), weight, 1e-5, residual)

    def fused(in_two_shots: bool) -> Callable[[], Tensor]:
        def sum_and_norm() -> Tensor:
            with patch.object(LamportBuffers, "use_two_shots", lambda *_: in_two_shots):
                return launchers.all_reduce_rms_norm(message, weight, 1e-5, residual, buffers)

        return sum_and_norm

    return {
        "norm_after": after,
        "norm_one_shot": fused(False),
        "norm_two_shots": fused(True),
        "norm_engine": fused(buffers.use_two_shots(len(message))),
        "gather_nccl": lambda: parallel.all_gather(message),
        "gather_engine": lambda: launchers.all_gather(message, buffers),
    }


def is_right(way: Callable[[], Tensor], parallel: TensorParallel, targets: list[Tensor]) -> bool:
    """Whether whole numbers that bf16 has exactly are summed to the expected ones."""
    pattern = torch.arange(targets[0].numel(), device=targets[0].device) % 11
    for target in targets:
        target.view(-1).copy_(pattern + parallel.rank)
    expected = parallel.size * pattern + parallel.size * (parallel.size - 1) // 2
    return bool(torch.equal(way().view(-1).float(), expected.float()))


def microseconds(way: Callable[[], Tensor]) -> float:
    """Of one sum, by this rank's clock."""
    graph = torch.cuda.CUDAGraph()
    way()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for _ in range(IN_A_ROW):
            way()
    times = []
    for replay in range(REPLAYS + 5):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.distributed.barrier()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if replay >= 5:
            times.append(1e3 * start.elapsed_time(end) / IN_A_ROW)
    return statistics.median(times)


def slowest_microseconds(way: Callable[[], Tensor], parallel: TensorParallel, device: torch.device) -> float:
    return -parallel.minimum(-round(1e3 * microseconds(way)), device) / 1e3


def run_rank(rank: int, ranks: int, store: str) -> None:
    """Measures all sizes; rank 0 writes them beside the store, as JSON."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    parallel = TensorParallel.connect(rank, ranks, device, store)
    parallel = parallel.with_symmetric_memory(SIZES[-1] // 2 // HIDDEN, HIDDEN, torch.bfloat16, device)
    rows = []
    for size in SIZES:
        message = torch.zeros(size // 2 // HIDDEN, HIDDEN, dtype=torch.bfloat16, device=device)
        view = parallel.product_buffer(*message.shape, message.dtype)
        row: dict[str, Any] = {"bytes": size}
        for name, way in ways_of(parallel, message).items():
            right = is_right(way, parallel, [message] if view is None else [message, view])
            if parallel.minimum(int(right), device) == 0:
                raise SystemExit(f"{name} sums {size} bytes wrongly")
            for target in [message] if view is None else [message, view]:
                target.normal_()  # sums of sums grow beyond all numbers, and take as long
            row[name] = slowest_microseconds(way, parallel, device)
        for name, way in norms_of(parallel, message).items():
            row[name] = slowest_microseconds(way, parallel, device)
        rows.append(row)
    if rank == 0:
        Path(f"{store}.json").write_text(json.dumps(rows))


def measure(ranks: int) -> list[dict[str, Any]]:
    """What rank 0 has written; all ranks end when one fails, since the others would wait for it."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "perf.all_reduce", "--ranks", str(ranks), "--store", f"{scratch}/ranks"]
        environment = worker_environment(EngineConfig())
        processes = [
            subprocess.Popen([*command, "--rank", str(rank)], env=environment, cwd=ROOT) for rank in range(ranks)
        ]
        try:
            while any(process.poll() is None for process in processes):
                if any(process.poll() for process in processes):
                    break
                time.sleep(0.1)
        finally:
            for process in processes:
                process.kill()
        if any([process.wait() for process in processes]):  # noqa: C419 (waits for all)
            raise click.ClickException("a rank has failed")
        rows: list[dict[str, Any]] = json.loads(Path(scratch, "ranks.json").read_text())
        return rows


def table_of(rows: list[dict[str, Any]], title: str) -> Table:
    ways = [name for name in rows[0] if name != "bytes"]
    table = Table("KB", *ways, title=title)
    for row in rows:
        table.add_row(f"{row['bytes'] >> 10}", *(f"{row[name]:.1f}" for name in ways))
    return table


@click.command(help=str(__doc__).partition("\n")[0])
@click.option("--ranks", default=2, show_default=True, type=click.IntRange(min=2))
@click.option("--out", type=click.Path(path_type=Path), help="the JSON file (default: in perf/results)")
@click.option("--rank", type=int, hidden=True)
@click.option("--store", hidden=True)
def main(ranks: int, out: Path | None, rank: int | None, store: str | None) -> None:
    if rank is not None and store is not None:
        run_rank(rank, ranks, store)
        return
    if torch.cuda.device_count() < ranks:
        raise click.UsageError(f"--ranks is {ranks}; allowed: at most {torch.cuda.device_count()}, the number of GPUs")
    rows = measure(ranks)
    gpu = torch.cuda.get_device_name()
    Console(width=120).print(table_of(rows, f"all-reduce of bf16 between {ranks} × {gpu}, µs"))
    result = {"benchmark": "all_reduce", "ranks": ranks, "in_a_row": IN_A_ROW, **circumstances(gpu), "rows": rows}
    where = f"all_reduce_{ranks}_{gpu}.json".replace(" ", "_").lower()
    write_result(out or RESULTS / where, result)


if __name__ == "__main__":
    main()
