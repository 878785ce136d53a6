# SPDX-License-Identifier: Apache-2.0
"""There is a benchmark for each kernel, its cases can be made, and the kernels agree with the reference on them."""

import dataclasses
import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from lightllm_backend.kernels import launchers
from perf import kernels as benchmarks
from perf.kernels import measure as measuring
from perf.kernels import pool
from perf.kernels.measure import Case, Place, benchmark, difference, measure
from perf.report import engine

command = importlib.import_module("perf.kernels.__main__")

# The interpreter's matrix products are wrong in bfloat16.
PLACE = Place(torch.device("cpu" if not torch.cuda.is_available() else "cuda"), torch.float16)
NOT_BENCHMARKS = {"__main__", "measure", "pool", "quantized"}


KERNELS = [name for name in launchers.__all__ if name != "arrange_weight"]  # which is done once, while loading


def test_there_is_one_for_each_kernel() -> None:
    files = {path.stem for folder in benchmarks.__path__ for path in Path(folder).glob("*.py")}
    assert files - NOT_BENCHMARKS == set(KERNELS)


@pytest.mark.parametrize("name", KERNELS)
def test_tiny_cases_agree_with_the_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "TABLE_WIDTH", 200)  # of which decode attention makes four parts, not 48
    torch.manual_seed(0)
    for size in benchmark(name).TINY:
        case = benchmark(name).case(PLACE, *size)
        assert difference(name, case) <= case.tolerance, case.label
        for prepare in case.torch.values() if name != "prefill_attention" else ():
            prepare(case.make())()


@pytest.mark.parametrize("name", KERNELS)
def test_the_sizes_are_cases(name: str) -> None:
    """Nothing is allocated yet. No two cases of a kernel have the same name, and each has something to do."""
    cases: list[Case] = [benchmark(name).case(PLACE, *size) for size in benchmark(name).SIZES]
    assert len({case.label for case in cases}) == len(cases) > 0
    assert all(case.bytes > 0 for case in cases)


def test_a_wrong_result_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = launchers.rms_norm
    case = benchmark("rms_norm").case(PLACE, 2, 96)
    monkeypatch.setattr(launchers, "rms_norm", lambda **given: right(**given) * 1.1)
    assert difference("rms_norm", case) > case.tolerance
    # What is only written to an argument counts as well.
    monkeypatch.setattr(
        launchers, "rms_norm", lambda **given: right(**(given | {"residual": given["residual"].clone()}))
    )
    assert difference("rms_norm", case) > case.tolerance


LIMITS = {"gpu": "a GPU", "read_bytes_per_second": 4e12, "bf16_flops_per_second": 8e14}


def _always(seconds: float) -> Callable[[Sequence[Callable[[], Any]]], float]:
    def seconds_of(calls: Sequence[Callable[[], Any]]) -> float:
        for call in calls:
            call()
        return seconds

    return seconds_of


def test_a_row_says_how_near_the_limit_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "seconds_of", _always(1e-5))
    monkeypatch.setattr(measuring, "ROTATED_BYTES", 1000)
    case = benchmark("linear").case(PLACE, "small", 2, 64, 128)
    row = measure("linear", dataclasses.replace(case, bytes=10**7, operations=4 * 10**9), LIMITS)
    assert row["us"] == pytest.approx(10)
    assert row["bytes_per_second"] == pytest.approx(1e12)
    assert row["share"] == pytest.approx(0.5)  # 5 µs for the arithmetic, 2.5 µs for the bytes
    assert row["torch_us"] == {"linear": pytest.approx(10)}
    lines = engine.kernels(result_of([row]))
    assert "| linear: small, 2 x 128 x 64 | 10.0 | 1,000 | 400 | 0.50 | linear 10.0 |" in lines


def test_what_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "seconds_of", None)
    case = dataclasses.replace(benchmark("gelu_tanh").case(PLACE, 2, 96), tolerance=-1.0)
    row = measure("gelu_tanh", case, LIMITS)
    assert row["is_wrong"]
    assert "| gelu_tanh: 2 x 96 | wrong |  |  |  |  |" in engine.kernels(result_of([row]))


def test_the_command_tells_and_stores_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(measuring, "seconds_of", _always(1e-5))
    monkeypatch.setattr(command, "hardware_limits", lambda: LIMITS)
    monkeypatch.setattr(command, "DEVICE", torch.device("cpu"))
    module = benchmark("gelu_tanh")
    monkeypatch.setattr(module, "SIZES", [(1, 40), (2, 40)])
    out = tmp_path / "kernels.json"
    run = CliRunner().invoke(command.main, ["gelu_tanh", "--out", str(out)])
    assert run.exit_code == 0, run.output
    assert [row["case"] for row in json.loads(out.read_text())["rows"]] == ["1 x 40", "2 x 40"]
    monkeypatch.setattr(launchers, "gelu_tanh", lambda x: x)
    run = CliRunner().invoke(command.main, ["gelu_tanh"])
    assert run.exit_code == 1
    assert "gelu_tanh at 1 x 40" in run.output


def result_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    machine, versions = {"gpu": "a GPU"}, {"torch": "2", "triton": "3"}
    return {"limits": LIMITS, "rows": rows, "machine": machine, "versions": versions, "commit": "c", "date": "d"}
