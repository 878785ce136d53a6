# SPDX-License-Identifier: Apache-2.0
"""The command on a tiny model on the CPU, and what stands beside its figures."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from perf import peer, static_inference
from perf.cases import Case
from perf.engine_under_test import BatchRun
from perf.model_cost import ModelCost
from perf.report import engine


class EngineOfKnownSpeed:
    """0.1 s for the first token of all, 10 ms for each other one."""

    def run(self, prompt_lengths: tuple[int, ...], output_len: int) -> BatchRun:
        return BatchRun(0.1 + 0.01 * (output_len - 1), 0.009, len(prompt_lengths), 0.008 * output_len)


def test_a_row_is_made_of_the_times() -> None:
    case = Case.equal(4, 50, 11)
    row = static_inference.measure(EngineOfKnownSpeed(), case, repeats=2)
    assert row["prefill_tokens_per_second"] == pytest.approx(2000)
    assert row["step_ms"] == pytest.approx(10)
    assert row["device_step_ms"] == pytest.approx(8)
    assert row["median_step_ms"] == pytest.approx(9)
    assert row["decode_tokens_per_second"] == pytest.approx(400)
    cost = ModelCost(layer_weights=10**9, head_weights=0, weight_bytes=10**9, slot_bytes=0, attention_flops=0)
    limits = {"read_bytes_per_second": 1e12, "bf16_flops_per_second": 1e13}
    static_inference.compare(row, case, cost, limits, num_gpus=2)
    assert row["floor_ms"] == pytest.approx(0.5)
    assert row["share"] == pytest.approx(0.05)
    assert row["prefill_flops_per_second"] == pytest.approx(2 * 1e9 * 200 / 0.1)
    assert row["prefill_share"] == pytest.approx(0.2)


def test_prefill_alone_has_no_step() -> None:
    row = static_inference.measure(EngineOfKnownSpeed(), Case.equal(1, 8192, 1), repeats=1)
    assert "step_ms" not in row
    assert row["prefill_ms"] == pytest.approx(100)


def _result(**changes: Any) -> dict[str, Any]:
    result: dict[str, Any] = {
        "model": "llama-7b",
        "machine": {"gpu": "NVIDIA H200"},
        "engine": {"dtype": "bfloat16"},
        "settings": {},
    }
    return result | changes


ROW = {"batch": 256, "prompt_tokens": 256 * 128, "output_len": 128, "mixed": False}


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> None:
    common = _result(benchmark="static_inference", peer="vLLM", versions={"vllm": "0.26.0"})
    full = {"step_ms": 17.22, "prefill_tokens_per_second": 44900}
    one = {"batch": 1, "prompt_tokens": 128, "step_ms": 4.59}
    found = [
        common | {"weights": "bf16", "tp": 1, "rows": [ROW | full, ROW | one]},
        common | {"weights": "bf16", "tp": 4, "rows": [ROW | {"step_ms": 6.66}]},
        common | {"weights": "fp8", "tp": 1, "rows": [ROW | {"step_ms": 14.96}]},
    ]
    monkeypatch.setattr(peer, "stored", lambda: found)


@pytest.mark.parametrize(
    ("result", "changes", "beside"),
    [
        (_result(), {}, {"peer_step_ms": 17.22, "peer_prefill_tokens_per_second": 44900}),
        (_result(), {"batch": 1, "prompt_tokens": 128}, {"peer_step_ms": 4.59}),
        (_result(settings={"LIGHTLLM_TP": "4"}), {}, {"peer_step_ms": 6.66}),
        (_result(settings={"LIGHTLLM_WEIGHT_DTYPE": "fp8"}), {}, {"peer_step_ms": 14.96}),
        (_result(settings={"LIGHTLLM_WEIGHT_DTYPE": "int8"}), {}, {"peer_step_ms": 14.96}),
        (_result(settings={"LIGHTLLM_WEIGHT_DTYPE": "int4"}), {}, {}),
        (_result(settings={"LIGHTLLM_WEIGHT_DTYPE": "fp8", "LIGHTLLM_HEAD_DTYPE": "int8"}), {}, {}),
        (_result(), {"output_len": 64}, {}),
        (_result(), {"prompt_tokens": 256 * 4096}, {}),
        (_result(), {"mixed": True}, {}),
        (_result(settings={"LIGHTLLM_KV_DTYPE": "int8"}), {}, {}),
        (_result(machine={"gpu": "another"}), {}, {}),
        (_result(engine={"dtype": "float16"}), {}, {}),
        (_result(model="llama-13b"), {}, {}),
    ],
)
def test_the_peer_stands_only_beside_what_it_ran(
    result: dict[str, Any], changes: dict[str, Any], beside: dict[str, float], peers: None
) -> None:
    assert peer.beside(peer.static_peer(result), ROW | changes) == beside


def test_it_runs_on_a_cpu_and_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static_inference, "RESULTS", tmp_path)
    arguments = "--model tiny --device cpu --batches 1,3 --input_len 4 --output_len 3 --case 1x40x1 --mixed 3x8"
    arguments += " --mean_context 12 --repeats 1 --dtype float32 --max_total_token_num 60 --case 9x9x9"
    arguments += " --weight_dtype int4,auto --head_dtype int8"
    run = CliRunner().invoke(static_inference.main, [*arguments.split(), "--plot"], catch_exceptions=False)
    assert run.exit_code == 0, run.output
    result = json.loads((tmp_path / "static_inference_tiny_head_int8_cpu.json").read_text())
    assert [row["batch"] for row in result["rows"]] == [1, 3, 1, 3]  # 9 x 9 tokens are more than the pool has
    assert [row.get("most_running") for row in result["rows"]] == [1, 3, None, 3]
    assert ["step_ms" in row for row in result["rows"]] == [True, True, False, True]
    assert result["settings"]["LIGHTLLM_MAX_TOTAL_TOKEN_NUM"] == "60"
    plot = tmp_path / "static_inference_tiny_head_int8_cpu.svg"
    assert ">mixed, 8 + 8 tokens<" in plot.read_text()
    assert plot.stat().st_size < 100_000
    lines = engine.static_inference(result)
    assert sum(line.startswith("| ") for line in lines) == 2 + 4
    assert "floor" not in lines[2], "there is none on a CPU"
    assert not any("vLLM" in line or "unquantised" in line for line in lines)
    quantised = json.loads((tmp_path / "static_inference_tiny_weights_int4_head_int8_cpu.json").read_text())
    assert quantised["engine"]["memory"]["weights"] < result["engine"]["memory"]["weights"]
    for row, plain in zip(quantised["rows"], result["rows"], strict=True):
        assert row["prefill_ratio"] == row["prefill_tokens_per_second"] / plain["prefill_tokens_per_second"]
        assert row.get("step_ratio", 0.0) == row.get("step_ms", 0.0) / plain.get("step_ms", 1.0)
    title, _, heading, *_ = engine.static_inference(quantised)
    assert title.startswith("**tiny, float32, weights int4, head int8, tp 1**")
    assert "| of unquantised tokens/s |" in heading
    assert "| of the unquantised step |" in heading


@pytest.mark.parametrize("dtypes", ["int5", "auto,", "auto int8"])
def test_a_type_of_weights_that_there_is_not(dtypes: str) -> None:
    run = CliRunner().invoke(static_inference.main, ["--weight_dtype", dtypes])
    assert run.exit_code == 2
    assert "allowed: some of auto, fp8, int8, int4" in " ".join(run.output.replace("│", " ").split())


def test_a_shape_has_no_weights_to_load() -> None:
    run = CliRunner().invoke(static_inference.main, ["--model", "tiny", "--no-dummy_weights"])
    assert run.exit_code == 2
    assert "--model_dir" in run.output
