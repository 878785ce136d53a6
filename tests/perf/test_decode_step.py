# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from click.testing import CliRunner

from lightllm_backend.parallel import TensorParallel
from perf import decode_step, power_limit
from perf.report import engine
from perf.shapes import SHAPES
from tests.models.thread_parallel import run_ranks


def test_a_step_has_as_many_sequences_as_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_step, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(decode_step, "DTYPE", torch.float32)
    step = decode_step.DecodeStep("tiny", 3)
    with torch.inference_mode():
        three, two = step.of(3)(), step.of(2)()
    assert three.shape == (3, SHAPES["tiny"]["vocab_size"])
    assert torch.isfinite(three).all()
    assert not torch.equal(three[0], three[1])
    assert torch.allclose(three[:2], two, atol=1e-5)  # others in the batch make no difference


def test_ranks_compute_a_step_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_step, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(decode_step, "DTYPE", torch.float32)
    logits = {}

    @torch.inference_mode()
    def run(parallel: TensorParallel) -> None:
        logits[parallel.rank] = decode_step.DecodeStep("tiny", 3, parallel=parallel).of(3)()

    run_ranks(2, run)
    assert logits[0].shape == (3, SHAPES["tiny"]["vocab_size"])
    assert torch.isfinite(logits[0]).all()
    assert torch.equal(logits[0], logits[1])


def test_power_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run = CliRunner().invoke(power_limit.main, [])
    assert run.exit_code == 2
    assert "PyTorch finds no GPU" in run.output


def test_power_is_told_beside_the_limit() -> None:
    row = {"batch": 8, "rested_ms": 2.0, "sustained_ms": 2.5, "watts": 600.0, "limit_watts": 700.0, "megahertz": 1500.0,
           "joules": 1.5}  # fmt: skip
    result = {
        "model": "tiny", "context": 9, "machine": {"gpu": "a GPU", "cpu": "a CPU", "cores": 2}, "rows": [row],
        "date": "2026-01-01", "commit": "abc", "versions": {"torch": "2", "triton": "3"},
    }  # fmt: skip
    lines = engine.power_limit(result)
    assert "limit 700 W" in lines[0]
    assert lines[-1] == "| 8 | 2.00 | 2.50 | 600 | 1,500 | 1.50 |"
