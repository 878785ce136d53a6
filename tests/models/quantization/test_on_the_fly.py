# SPDX-License-Identifier: Apache-2.0
"""weight_dtype: float checkpoints that are quantised while they load."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightllm_backend.config import EngineConfig
from lightllm_backend.kernels import reference
from lightllm_backend.models.errors import ModelError
from lightllm_backend.models.model_config import ModelConfig
from lightllm_backend.models.quantization import on_the_fly
from lightllm_backend.models.quantization.on_the_fly import quantize_8_bits, quantize_int4
from lightllm_backend.worker.load import load_engine
from tests.models.quantization.checkpoints import awq, write_checkpoint
from tests.models.random_models import random_model, save_random_model
from tests.models.step_harness import check_steps, model_of
from tests.models.thread_parallel import run_ranks


def relative_error(got, expected):
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize(("weight_dtype", "error"), [("int8", 0.012), ("fp8", 0.03), ("int4", 0.12)])
def test_weights_are_near_those_of_the_checkpoint(tmp_path, weight_dtype, error, monkeypatch):
    """In more chunks than one. BLOOM with 8 heads has 128 and 512 inputs."""
    monkeypatch.setattr(on_the_fly, "_CHUNK", 1000)
    save_random_model("bloom_8_heads", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    config = ModelConfig.from_directory(tmp_path).with_weight_dtype(weight_dtype, "auto", 1)
    model = model_of(tmp_path, config)
    for name, weight in (
        ("self_attention.query_key_value", model.layers[1].attention.qkv.weight),
        ("mlp.dense_4h_to_h", model.layers[1].mlp.down.weight),
    ):
        expected = tensors[f"transformer.h.1.{name}.weight"]
        found = relative_error(reference.dequantize(weight, torch.float32), expected)
        assert error / 3 < found < error, name
    assert isinstance(model.head.weight, torch.Tensor)


def test_weights_that_a_checkpoint_has_fused(tmp_path):
    """Two ranks hold what one holds, of each part of the fused matrices."""
    save_random_model("phi3", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    config = ModelConfig.from_directory(tmp_path).with_weight_dtype("int8", "auto", 1)
    found = {}

    def run(parallel):
        layer = model_of(tmp_path, config, parallel).layers[1]
        for name, linear in (("self_attn.qkv_proj", layer.attention.qkv), ("mlp.gate_up_proj", layer.mlp.gate_up)):
            parts = reference.dequantize(linear.weight, torch.float32).split([part.rows for part in linear.parts])
            found[name, parallel.rank] = parts

    run_ranks(2, run)
    for name in ("self_attn.qkv_proj", "mlp.gate_up_proj"):
        whole = torch.cat([part for both in zip(found[name, 0], found[name, 1], strict=True) for part in both])
        assert relative_error(whole, tensors[f"model.layers.1.{name}.weight"]) < 0.012


def test_a_head_of_8_bits(tmp_path):
    """Also beside weights that the checkpoint has quantised."""
    expected = write_checkpoint(tmp_path, "llama2_gqa", awq(8), {"quant_method": "awq", "group_size": 8})
    config = ModelConfig.from_directory(tmp_path).with_weight_dtype("auto", "int8", 1)
    model = model_of(tmp_path, config)
    head = reference.dequantize(model.head.weight, torch.float32)
    assert 0.002 < relative_error(head, expected.lm_head.weight) < 0.012
    with torch.no_grad():
        expected.lm_head.weight.copy_(head)
    check_steps(model, expected)
    save_random_model("bloom_6_heads", tmp_path)
    with pytest.raises(ModelError, match=r"head_dtype is 'fp8', but the head's .* embeddings .* allowed: 'auto'"):
        load_engine(EngineConfig(model_dir=str(tmp_path), head_dtype="fp8"))


def test_ranks_hold_their_parts(tmp_path):
    """Scales by output feature differ where the inputs are split, but by little."""
    save_random_model("bloom_8_heads", tmp_path)
    config = ModelConfig.from_directory(tmp_path).with_weight_dtype("int4", "auto", 2)
    whole = reference.dequantize(model_of(tmp_path, config).layers[0].mlp.up.weight, torch.float32)
    parts = {}
    run_ranks(2, lambda parallel: parts.update({parallel.rank: model_of(tmp_path, config, parallel).layers[0].mlp.up}))
    both = torch.cat([reference.dequantize(parts[rank].weight, torch.float32) for rank in range(2)])
    assert torch.equal(both, whole)


def test_the_search_is_better_than_the_largest_magnitude():
    groups = torch.randn(64, 4, 128, generator=torch.Generator().manual_seed(0))
    values, scales = quantize_int4(groups, torch.float16)
    assert int(values.min()) >= 0
    assert int(values.max()) <= 15
    found = relative_error((values.float() - 8) * scales.unsqueeze(-1), groups)
    scale = groups.abs().amax(-1, keepdim=True) / 7
    assert found < 0.9 * relative_error((groups / scale).round() * scale, groups)


def test_groups_of_zeros():
    groups = torch.zeros(1, 2, 32)
    groups[0, 1] = 3.0
    values, scales = quantize_int4(groups, torch.float16)
    torch.testing.assert_close((values.float() - 8) * scales.unsqueeze(-1), groups)
    for dtype in (torch.int8, torch.float8_e4m3fn):
        values, scales = quantize_8_bits(groups, dtype)
        torch.testing.assert_close(values.float() * scales.unsqueeze(-1), groups)


def test_int8_weights_leave_the_tokens_logits_near(tmp_path):
    save_random_model("llama2_gqa", tmp_path)
    model = model_of(tmp_path, ModelConfig.from_directory(tmp_path).with_weight_dtype("int8", "auto", 1))
    check_steps(model, random_model("llama2_gqa"), tolerance=0.5)


def test_what_cannot_be_quantised(tmp_path):
    save_random_model("llama2_gqa", tmp_path)
    with pytest.raises(
        ModelError, match=r"weight_dtype is 'int4', whose groups .* 56, 64 input .* allowed: 'auto', 'fp8'"
    ):
        load_engine(EngineConfig(model_dir=str(tmp_path), weight_dtype="int4"))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.up_proj\.weight holds NaN or an infinite number; finite"):
        load_engine(EngineConfig(model_dir=str(tmp_path), weight_dtype="int8"))
    write_checkpoint(tmp_path, "llama2_gqa", awq(8), {"quant_method": "awq", "group_size": 8})
    with pytest.raises(
        ModelError, match=r"weight_dtype is 'fp8', but the .* quantised already \(awq\); allowed: 'auto'"
    ):
        load_engine(EngineConfig(model_dir=str(tmp_path), weight_dtype="fp8"))
