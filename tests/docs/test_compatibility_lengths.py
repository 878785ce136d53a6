# SPDX-License-Identifier: Apache-2.0
"""The section on lengths of docs/compatibility.md against the code."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lightllm_backend.config import EngineConfig
from lightllm_backend.lengths import LengthLimits
from lightllm_backend.models.model_config import UNLIMITED_POSITIONS, ModelConfig
from lightllm_backend.models.rope import ORIGINAL, ROPE_TYPES, Rope
from lightllm_backend.models.rotary import RotaryEmbedding
from lightllm_backend.options import check_lengths
from lightllm_backend.request import RequestError, SamplingParams
from lightllm_backend.runner.device_tables import DeviceTables
from lightllm_backend.worker.load import CPU_POOL_TOKENS

PAGE = (Path(__file__).parents[2] / "docs" / "compatibility.md").read_text()
SECTION = PAGE.partition("\n## Lengths\n")[2].partition("\n## ")[0]

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 256, "intermediate_size": 32,
    "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
}  # fmt: skip
GEMMA3 = LLAMA | {"architectures": ["Gemma3ForCausalLM"], "num_key_value_heads": 2}
BLOOM = {
    "architectures": ["BloomForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "n_layer": 1,
    "n_head": 2,
    "layer_norm_epsilon": 1e-5,
}
FACTOR = 4.0


def table(*heading: str) -> list[list[str]]:
    """The rows of the table with this heading."""
    lines = SECTION.splitlines()
    first = lines.index("| " + " | ".join(heading).strip() + " |") + 2
    rows = []
    for line in lines[first:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return rows


def model(directory: Path, config: dict[str, object]) -> ModelConfig:
    (directory / "config.json").write_text(json.dumps(config))
    return ModelConfig.from_directory(directory)


def test_defaults_are_those_of_the_code() -> None:
    defaults = {name: default for name, default, _ in table("setting", "default", "")}
    config = EngineConfig()
    for name in ("max_req_total_len", "max_req_input_len", "running_max_req_size"):
        value = getattr(config, name)
        assert defaults.pop(f"`{name}`") == ("–" if value is None else f"`{value}`")
    assert defaults == {"`max_tokens` of a request": f"`{SamplingParams().max_tokens}`"}
    assert f"On a CPU the pool has {CPU_POOL_TOKENS:,} tokens" in SECTION


def test_the_model_s_limit_is_as_the_table_says(tmp_path: Path) -> None:
    rows = {
        (architecture, kind.strip("`")): limit
        for architecture, kind, limit in table("architecture", "`rope_type`", "the model's limit")
    }
    assert {kind for _, kind in rows} == {*ROPE_TYPES, "any", "–"}
    scaling = {"factor": FACTOR, "low_freq_factor": 1.0, "high_freq_factor": 4.0, ORIGINAL: 1024}
    scaling |= {"short_factor": [1.0] * 64, "long_factor": [2.0] * 64}
    for kind in ROPE_TYPES:
        formula = rows["all with RoPE", kind].replace("`", "").split(" × ")
        numbers = {"max_position_embeddings": 4096, "factor": FACTOR, ORIGINAL: 1024}
        expected = math.prod(numbers[name] for name in formula)
        assert model(tmp_path, LLAMA | {"rope_scaling": {"rope_type": kind, **scaling}}).max_sequence_length == expected
    assert rows["Gemma 3", "any"] == "`max_position_embeddings`"
    scaled = GEMMA3 | {"rope_scaling": {"rope_type": "linear", "factor": FACTOR}}
    assert model(tmp_path, scaled).max_sequence_length == 4096
    assert rows["BLOOM", "–"] == f"`seq_length`; without it {UNLIMITED_POSITIONS}"
    assert model(tmp_path, BLOOM).max_sequence_length == UNLIMITED_POSITIONS
    assert model(tmp_path, BLOOM | {"seq_length": 77}).max_sequence_length == 77


@pytest.mark.parametrize(
    ("source", "settings", "positions"),
    [("the setting", {"max_req_total_len": 3072}, 8192), ("the model", {}, 8192), ("the KV pool", {}, 131072)],
)
def test_messages_are_those_of_the_code(source: str, settings: dict[str, int], positions: int) -> None:
    [ending] = [
        message.strip("`") for name, message in table("the limit is set by", "the message ends with") if name == source
    ]
    limits = LengthLimits.of(EngineConfig(**settings), positions, CPU_POOL_TOKENS)
    with pytest.raises(RequestError) as refusal:
        check_lengths(1, 10**9, limits)
    assert refusal.value.message.endswith(f"; {ending}")


def test_what_is_said_at_start_is_the_code_s() -> None:
    limits = LengthLimits.of(EngineConfig(), 131072, 900000)
    assert f"a request   {limits}\n" in SECTION


def test_memory_is_as_the_table_says(tmp_path: Path) -> None:
    rows = table("", "bytes", "at 131,072 positions")
    length, head_dim, original = 131072, 128, 4096
    config = model(tmp_path, LLAMA)
    assert config.head_dim == head_dim
    dynamic = Rope(head_dim, rope_type="dynamic", factor=32.0, original_max_positions=original)
    longrope = replace(dynamic, rope_type="longrope", short_factors=(1.0,) * 64, long_factors=(2.0,) * 64)
    formulas = [
        ("2 × 4 × (`running_max_req_size` + 1) × length", DeviceTables.num_bytes(1000, length)),
        ("4 × `head_dim` × length", RotaryEmbedding(config.ropes[0], length, torch.device("cpu")).table.nbytes),
        (
            "4 × `head_dim` × (original + length)",
            RotaryEmbedding(longrope, length, torch.device("cpu")).table.nbytes,
        ),
        (
            "2 × `head_dim` × (length − original + 1)",
            RotaryEmbedding(dynamic, length, torch.device("cpu")).frequencies.nbytes,
        ),
    ]
    assert [(formula, size) for _, formula, size in rows] == [
        (formula, f"{size / 2**20:,.1f} MiB") for formula, size in formulas
    ]
    for formula, size in formulas:
        expression = re.sub("`", "", formula).replace("×", "*").replace("−", "-")
        values = {"running_max_req_size": 1000, "length": length, "head_dim": head_dim, "original": original}
        assert eval(expression, {}, values) == size
