# SPDX-License-Identifier: Apache-2.0
"""What one GPU can do at best, measured now: bytes read from its memory, bf16 and fp8 arithmetic, each a second.

`python -m perf.hardware_limits` prints a JSON object. The benchmarks run it as a process of its own, so that the memory
that it uses is free again before an engine starts.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

READ_BYTES = 8 << 30
MATRIX_SIZE = 8192
REPEATS = 9


@triton.jit
def _read(source, sums, per_program, block: tl.constexpr):  # type: ignore[no-untyped-def]
    """Each program reads its own stretch and keeps nothing but a sum, so that nothing is written."""
    program = tl.program_id(0).to(tl.int64)
    offsets = program * per_program + tl.arange(0, block)
    total = tl.zeros((block,), tl.int32)
    for start in range(0, per_program, block):
        total += tl.load(source + offsets + start)
    tl.store(sums + program, tl.sum(total, 0))


def seconds_of(work: Callable[[], Any]) -> float:
    """The median over some runs, by the GPU's own clock."""
    work()
    times = []
    for _ in range(REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return float(statistics.median(times))


def read_bytes_per_second() -> float:
    """Of several shapes of the same loop, the quickest."""
    source = torch.randint(-1000, 1000, (READ_BYTES // 4,), dtype=torch.int32, device="cuda")
    best = 0.0
    for block, warps, num_programs in ((4096, 8, 8192), (8192, 16, 4096), (2048, 4, 16384), (8192, 8, 16384)):
        sums = torch.empty(num_programs, dtype=torch.int32, device="cuda")
        per_program = source.numel() // num_programs
        assert per_program % block == 0, "every byte is read once"

        def read() -> None:
            _read[(num_programs,)](source, sums, per_program, block=block, num_warps=warps)  # noqa: B023 (used at once)

        best = max(best, READ_BYTES / seconds_of(read))
    return best


def bf16_flops_per_second() -> float:
    left, right = (torch.randn(MATRIX_SIZE, MATRIX_SIZE, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return 2 * MATRIX_SIZE**3 / seconds_of(lambda: left @ right)


def fp8_flops_per_second() -> float | None:
    """None on GPUs whose tensor cores do not take fp8."""
    if torch.cuda.get_device_capability() < (8, 9):
        return None
    left, right = (torch.randn(MATRIX_SIZE, MATRIX_SIZE, device="cuda").to(torch.float8_e4m3fn) for _ in range(2))
    scale = torch.ones((), device="cuda")
    scales = {"scale_a": scale, "scale_b": scale, "out_dtype": torch.bfloat16, "use_fast_accum": True}
    multiply = torch._scaled_mm  # noqa: SLF001 - torch 2.10 is the first with a public function
    return 2 * MATRIX_SIZE**3 / seconds_of(lambda: multiply(left, right.t(), **scales))


def hardware_limits() -> dict[str, Any] | None:
    """Measured in a process of its own; None on a machine without a GPU."""
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-m", "perf.hardware_limits"]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=root)
    limits: dict[str, Any] | None = json.loads(run.stdout)
    return limits


if __name__ == "__main__":
    measured = None
    if torch.cuda.is_available():
        measured = {
            "gpu": torch.cuda.get_device_name(),
            "read_bytes_per_second": read_bytes_per_second(),
            "bf16_flops_per_second": bf16_flops_per_second(),
            "fp8_flops_per_second": fp8_flops_per_second(),
        }
    print(json.dumps(measured))
