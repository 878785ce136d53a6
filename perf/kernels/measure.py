# SPDX-License-Identifier: Apache-2.0
"""How a kernel is measured: what a benchmark file says of its cases, and the times of a CUDA graph that replays them.

A file perf/kernels/NAME.py is about the launcher NAME. It has SIZES (of real models), TINY (for the interpreter, in the
tests) and `case(place, *size)`. A case is checked against the reference before it is timed.
"""

from __future__ import annotations

import importlib
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightllm_backend.kernels import launchers, reference

Arguments = dict[str, Any]

# Inputs rotate, so that a call's are not in the L2 cache any more: together they are several times as large as it is.
ROTATED_BYTES = 256 << 20
MOST_SETS = 32
GRAPH_SECONDS = 5e-3
MOST_CALLS = 256
REPLAYS = 9


class Place(NamedTuple):
    """Where the tensors of a case are, and what type the model computes in."""

    device: torch.device
    dtype: torch.dtype

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=dtype or self.dtype)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.randint(low, high, shape, device=self.device, dtype=dtype)

    def full(self, value: float, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full(shape, value, device=self.device, dtype=dtype)


@dataclass(frozen=True)
class Case:
    """One call of a kernel."""

    label: str
    make: Callable[[], Arguments]  # other values with each call
    bytes: int  # what it must read and write at least
    operations: int = 0  # of matrix products
    # PyTorch's own for the same, where it has any: from a call's arguments to what is timed.
    torch: dict[str, Callable[[Arguments], Callable[[], Any]]] = field(default_factory=dict)
    changes: Sequence[str] = ()  # the arguments that it writes to
    result: Callable[[Any], Any] = lambda result: result  # what of the result must agree with the reference
    tolerance: float = 0.02


def benchmark(name: str) -> ModuleType:
    return importlib.import_module(f"perf.kernels.{name}")


def difference(name: str, case: Case) -> float:
    """The greatest relative difference between the kernel's results and the reference's; of integers, their share."""
    arguments = case.make()
    written = [key for key in case.changes if arguments[key] is not None]
    copies = {key: arguments[key].clone() for key in written}
    with sdpa_kernel(SDPBackend.MATH):
        expected = getattr(reference, name)(**(arguments | copies))
    result = getattr(launchers, name)(**arguments)
    pairs = [(arguments[key], copies[key]) for key in written]
    if isinstance(case.result(expected), Tensor):
        pairs.append((case.result(result), case.result(expected)))
    return max(_difference(one, other) for one, other in pairs)


def _difference(result: Tensor, expected: Tensor) -> float:
    if not expected.is_floating_point():
        return float((result != expected).float().mean())
    if torch.equal(result, expected):  # infinite ones too
        return 0.0
    expected = expected.float()
    error = (result.float() - expected).norm() / expected.norm().clamp_min(1e-30)
    return float(error.nan_to_num(math.inf))


def seconds_of(calls: Sequence[Callable[[], Any]]) -> float:
    """The median time of one of the calls, by the GPU's clock, in a CUDA graph that makes them in turns."""
    for call in calls:
        call()  # compiles, and chooses algorithms
    once = elapsed(lambda: [call() for call in calls]) / len(calls)
    rounds = math.ceil(min(MOST_CALLS, GRAPH_SECONDS / once) / len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    graph.replay()
    return statistics.median(elapsed(graph.replay, before=graph.replay) for _ in range(REPLAYS)) / rounds / len(calls)


def elapsed(work: Callable[[], Any], before: Callable[[], Any] = lambda: None) -> float:
    """Seconds; `before` keeps the GPU busy while the host prepares what is timed."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    before()
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def measure(name: str, case: Case, limits: dict[str, Any]) -> dict[str, Any]:
    """One row of the result. What differs from the reference is not timed."""
    error = difference(name, case)
    row: dict[str, Any] = {
        "kernel": name,
        "case": case.label,
        "bytes": case.bytes,
        "operations": case.operations,
        "difference": error,
    }
    if error > case.tolerance:
        return row | {"is_wrong": True}
    sets = [case.make() for _ in range(min(MOST_SETS, max(2, math.ceil(ROTATED_BYTES / case.bytes))))]
    launcher = getattr(launchers, name)
    seconds = seconds_of([_call(launcher, arguments) for arguments in sets])
    least = max(case.bytes / limits["read_bytes_per_second"], case.operations / limits["bf16_flops_per_second"])
    row |= {
        "us": 1e6 * seconds,
        "bytes_per_second": case.bytes / seconds,
        "operations_per_second": case.operations / seconds,
        "share": least / seconds,
        "torch_us": {},
    }
    for peer, prepare in case.torch.items():
        try:
            calls = [prepare(arguments) for arguments in sets]
            calls[0]()
        except RuntimeError:  # this backend does not take this shape
            continue
        row["torch_us"][peer] = 1e6 * seconds_of(calls)
    return row


def _call(launcher: Callable[..., Any], arguments: Arguments) -> Callable[[], Any]:
    return lambda: launcher(**arguments)
