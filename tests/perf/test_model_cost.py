# SPDX-License-Identifier: Apache-2.0
"""What a step and a prefill cost at least, against the sums written out for each shape."""

import json
from pathlib import Path

import pytest
import torch

from perf.model_cost import ModelCost
from perf.shapes import SHAPES

LIMITS = {"read_bytes_per_second": 4.53e12, "bf16_flops_per_second": 790e12}


def cost_of(
    name: str, directory: Path, kv_dtype: torch.dtype = torch.bfloat16, weight_dtype: str = "auto"
) -> ModelCost:
    (directory / "config.json").write_text(json.dumps(SHAPES[name]))
    return ModelCost.of(str(directory), torch.bfloat16, kv_dtype, weight_dtype)


@pytest.mark.parametrize(
    ("name", "matrices", "head", "kv_values"),
    [
        ("llama-7b", 32 * (4 * 4096**2 + 3 * 4096 * 11008), 32000 * 4096, 32 * 2 * 4096),
        ("llama-3-8b", 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336), 128256 * 4096, 32 * 2 * 1024),
        ("gemma-3-12b", 48 * 3840 * (3 * 15360 + 2 * 4096 + 2 * 2048), 262208 * 3840, 48 * 2 * 2048),
        ("qwen3-8b", 36 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 12288), 151936 * 4096, 36 * 2 * 1024),
        ("bloom-7b1", 30 * 12 * 4096**2, 250880 * 4096, 30 * 2 * 4096),
    ],
)
def test_weights_and_kv(name: str, matrices: int, head: int, kv_values: int, tmp_path: Path) -> None:
    cost = cost_of(name, tmp_path)
    # Norms and biases are the little that is left.
    assert matrices < cost.layer_weights < 1.001 * matrices
    assert cost.head_weights == head
    # The weights of Gemma's norms are float32.
    assert 0 <= cost.weight_bytes - 2 * (cost.layer_weights + head) <= 2 * (cost.layer_weights - matrices)
    assert cost.slot_bytes == 2 * kv_values
    assert cost_of(name, tmp_path, torch.int8).slot_bytes == kv_values * (1 + 2 / (256 if "gemma" in name else 128))


def test_windows_hide_what_is_behind_them(tmp_path: Path) -> None:
    """In five of six layers of Gemma 3 a query sees 1,024 tokens."""
    cost = cost_of("gemma-3-12b", tmp_path)
    limits = {**LIMITS, "read_bytes_per_second": 1.0}
    for contexts, in_layers in (([500], 500), ([32768, 32768], 65536 / 6 + 5 / 6 * 2048)):
        seconds = cost.step_seconds(len(contexts), sum(contexts), limits)
        assert seconds == pytest.approx(cost.weight_bytes + in_layers * cost.slot_bytes)
    pairs = (cost.prefill_flops([1024 + 3]) - 2 * cost.layer_weights * 1027 - 2 * cost.head_weights) / (4 * 16 * 256)
    assert pairs == 8 * (1027 * 1028 // 2) + 40 * (1024 * 1025 // 2 + 3 * 1024)


@pytest.mark.parametrize(
    ("batch", "floor_ms"), [(1, 2.94), (8, 3.09), (32, 3.63), (64, 4.34), (128, 5.76), (256, 9.97)]
)
def test_the_floor_of_llama_7b(batch: int, floor_ms: float, tmp_path: Path) -> None:
    floor = 1e3 * cost_of("llama-7b", tmp_path).step_seconds(batch, 192 * batch, LIMITS)
    assert floor == pytest.approx(floor_ms, rel=0.01)


@pytest.mark.parametrize(
    ("weight_dtype", "bits", "floors_ms"),
    [("fp8", 8, {1: 1.52, 64: 2.92, 256: 7.84}), ("int8", 8, {1: 1.52, 256: 9.97}), ("int4", 4.125, {1: 0.817})],
)
def test_quantised_weights_are_fewer_bytes(
    weight_dtype: str, bits: float, floors_ms: dict[int, float], tmp_path: Path
) -> None:
    plain, cost = cost_of("llama-7b", tmp_path), cost_of("llama-7b", tmp_path, weight_dtype=weight_dtype)
    matrices = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert (cost.layer_weights, cost.head_weights) == (plain.layer_weights, plain.head_weights)
    assert cost.weight_bytes - 2 * cost.head_weights == pytest.approx(matrices * bits / 8, rel=0.002)
    assert cost.eight_bit_weights == (matrices if weight_dtype == "fp8" else 0)
    limits = LIMITS | {"fp8_flops_per_second": 2 * LIMITS["bf16_flops_per_second"]}
    for batch, floor_ms in floors_ms.items():
        assert 1e3 * cost.step_seconds(batch, 192 * batch, limits) == pytest.approx(floor_ms, rel=0.01)


def test_prefill_counts_every_pair_and_the_last_logits(tmp_path: Path) -> None:
    cost = cost_of("tiny", tmp_path)
    layers, width, vocabulary = 2, 128, 1000
    pairs = (1 + 2 + 3) + (1 + 2)
    attention = layers * 4 * width * pairs
    expected = 2 * cost.layer_weights * 5 + 2 * vocabulary * width * 2 + attention
    assert cost.prefill_flops([3, 2]) == expected
