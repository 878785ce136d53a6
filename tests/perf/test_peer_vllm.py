# SPDX-License-Identifier: Apache-2.0
"""The measurement of vLLM, with a stand-in for the package whose clock tells how long it took."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from perf import peer, peer_vllm
from perf.report import engine

ROOT = Path(__file__).parents[2]


class StandIn:
    """A batch of n takes n ms and another 10 ms for each token of the longest answer."""

    def __init__(self) -> None:
        self.now = 0.0
        self.arguments: dict[str, Any] = {}
        self.config: dict[str, Any] = {}
        self.made = 0  # tokens beside those that are asked for
        self.module = ModuleType("vllm")
        self.module.__version__ = "0.26.0"
        self.module.SamplingParams = SimpleNamespace
        self.module.LLM = self.start

    def start(self, *, model: str, **arguments: Any) -> "StandIn":
        self.config = json.loads(Path(model, "config.json").read_text())
        self.arguments = arguments
        self.now += 60.0
        return self

    def generate(self, prompts: list[Any], sampling: list[Any], *, use_tqdm: bool) -> list[Any]:
        assert all(set(prompt) == {"prompt_token_ids"} and len(prompt["prompt_token_ids"]) > 0 for prompt in prompts)
        assert all(one.temperature == 0 and one.ignore_eos and not one.detokenize for one in sampling)
        assert not use_tqdm
        self.now += 1e-3 * len(prompts) + 1e-2 * max(one.max_tokens for one in sampling)
        outputs = [SimpleNamespace(token_ids=[3] * (one.max_tokens + self.made)) for one in sampling]
        return [SimpleNamespace(outputs=[output]) for output in outputs]


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "vllm", stand_in.module)
    monkeypatch.setattr(peer_vllm, "perf_counter", lambda: stand_in.now)
    monkeypatch.setattr(peer_vllm, "nvidia_gpu_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(os, "environ", dict(os.environ) | {"VLLM_USE_DEEP_GEMM": "0"})
    return stand_in


def test_its_results_stand_beside_ours(vllm: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = tmp_path / "pair.csv"
    lengths.write_text("prompt_tokens,output_tokens\n5,98\n7,2\n")
    arguments = ["--model", "llama-7b", "--weights", "awq", "--batches", "1,40", "--lengths", str(lengths)]
    peer_vllm.main([*arguments, "--results", str(tmp_path), "--repeats", "1"])
    assert vllm.config["quantization_config"]["quant_method"] == "awq"
    assert vllm.config["model_type"] == "llama"
    assert vllm.arguments["dtype"] == "float16"
    assert vllm.arguments["load_format"] == "dummy"

    static = json.loads((tmp_path / "peer_vllm_llama-7b_awq_nvidia_h200.json").read_text())
    assert static["start_seconds"] == 60.0
    assert {"VLLM_USE_DEEP_GEMM": "0", "VLLM_NO_USAGE_STATS": "1"}.items() <= static["settings"].items()
    assert [row["prefill_ms"] for row in static["rows"]] == pytest.approx([11, 50])
    assert [row["step_ms"] for row in static["rows"]] == pytest.approx([10, 10])
    service = json.loads((tmp_path / "peer_vllm_llama-7b_awq_pair_nvidia_h200.json").read_text())
    assert service["runs"][0]["requests_per_second"] == pytest.approx(2 / (0.002 + 0.98))
    assert service["runs"][0]["output_tokens_per_second"] == pytest.approx(100 / (0.002 + 0.98))

    monkeypatch.setattr(peer, "RESULTS", tmp_path)
    ours = {
        "model": "llama-7b", "machine": {"gpu": "NVIDIA H200"}, "engine": {"dtype": "bfloat16"}, "commit": "abc",
        "settings": {"LIGHTLLM_WEIGHT_DTYPE": "int4"}, "start_seconds": None, "date": "2026-11-29",
        "versions": {"torch": None, "triton": None},
        "rows": [{"batch": 40, "prompt_tokens": 5120, "output_len": 128, "mixed": False, "step_ms": 4.0}],
    }  # fmt: skip
    *_, heading, _, row = engine.static_inference(ours)
    cells = dict(zip(heading.strip("| ").split(" | "), row.strip("| ").split(" | "), strict=True))
    assert cells["vLLM 0.26.0 awq, ms"] == "10.00"
    assert cells["vLLM 0.26.0 awq, tokens/s"] == "102,400"


def test_a_wrong_number_of_tokens_is_no_figure(vllm: StandIn, tmp_path: Path) -> None:
    vllm.made = 1
    with pytest.raises(peer_vllm.WrongAnswer, match="2 tokens came, 1 were asked for"):
        peer_vllm.main(["--results", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_a_step_needs_two_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        peer_vllm.main(["--output_len", "1"])
    assert "--output_len is 1; allowed: at least 2" in capsys.readouterr().err


def test_it_needs_no_package_but_vllm() -> None:
    # -S: without the installed packages.
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import perf.peer_vllm"
    subprocess.run([sys.executable, "-I", "-S", "-c", program], check=True, cwd="/")
