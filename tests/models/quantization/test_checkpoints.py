# SPDX-License-Identifier: Apache-2.0
"""Quantised checkpoints against transformers, in float32, with the weights that they stand for."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from lightllm_backend.kernels import reference
from lightllm_backend.kernels.quantized.weight import QuantizedWeight
from lightllm_backend.models.causal_lm import model_class
from lightllm_backend.models.dry_load import dry_load
from lightllm_backend.models.errors import ModelError
from lightllm_backend.models.model_config import ModelConfig
from lightllm_backend.models.weights import dummy_weights
from lightllm_backend.parallel import TensorParallel
from lightllm_backend.request import SamplingParams
from tests.models.quantization import checkpoints
from tests.models.quantization.checkpoints import Store, linear_layers, round_inputs, write_checkpoint
from tests.models.random_models import VOCAB, random_model
from tests.models.step_harness import CPU, check_reads_nothing_back, check_steps, load_model
from tests.models.thread_parallel import run_ranks
from tests.runner.engine_harness import load, run

DOWN = "model.layers.1.mlp.down_proj"


@dataclass(frozen=True)
class Case:
    family: str
    store: Store
    config: dict[str, Any]
    more: dict[str, Any] = field(default_factory=dict)
    rounded: Callable[[str, torch.Tensor], torch.Tensor] | None = None


def compressed(
    weights: dict[str, Any], stored: str, inputs: dict[str, Any] | None = None, **more: Any
) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {"quant_method": "compressed-tensors", "format": stored, "config_groups": {"group_0": group}, **more}


def input_scale(name: str) -> float:
    """q, k and v differ, as a tool that knows each alone would have them; the largest is that of the fused matrix."""
    return {"q": 0.007, "k": 0.009, "v": 0.01, "u": 0.02}.get(name.rpartition(".")[2][0], 0.02)


def fp8_static(name: str, x: torch.Tensor) -> torch.Tensor:
    scale = 0.01 if name.rpartition(".")[2][0] in "qkv" else 0.02
    return checkpoints.fp8(x, scale).float() * scale


def auto_round(packing: str, **more: Any) -> dict[str, Any]:
    """As AutoRound 0.16 writes it."""
    return {"quant_method": "auto-round", "packing_format": packing, "bits": 4, "group_size": 32, "sym": True,
            "data_type": "int", "iters": 200, "autoround_version": "0.16.1", **more}  # fmt: skip


def auto_round_mixed(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    bits, size = (8, 16) if name == DOWN else (4, 32)
    stored = checkpoints.gptq(bits, size, symmetric=True, in_order=True, version=1)
    return checkpoints.without_index(stored)(name, weight)


def modelopt_mixed(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Scales by channel have one dimension."""
    if "mlp" in name:
        return checkpoints.int8_by_channel(name, weight)
    tensors, meant = checkpoints.fp8_by_channel(name, weight)
    return tensors | {"weight_scale": tensors["weight_scale"].flatten()}, meant


def modelopt_blocks(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """With scales of four dimensions."""
    return {"weight": tensors["weight"], "weight_scale": tensors["weight_scale_inv"][:, None, :, None]}


def by_transformers(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As FineGrainedFP8Config(weight_block_size=None) makes it write them."""
    return {
        "weight": tensors["weight"],
        "weight_scale_inv": tensors["weight_scale"].view(1, 1),
        "activation_scale": tensors["input_scale"],
    }


def by_torchao(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    zeros = {"_weight_zero_point": torch.zeros_like(tensors["weight_scale"], dtype=torch.int8)}
    int8 = tensors["weight"].dtype == torch.int8
    return {"_weight_qdata": tensors["weight"], "_weight_scale": tensors["weight_scale"], **(zeros if int8 else {})}


def torchao(kind: str, *granularity: str, **more: Any) -> dict[str, Any]:
    """As transformers 5.24 writes it for a configuration of torchao 0.18; two granularities in a list."""
    objects = [
        {"_type": name, "_version": 1, "_data": {} if name == "PerTensor" else {"dim": -1}} for name in granularity
    ]
    data = {"granularity": objects if len(objects) > 1 else objects[0], "set_inductor_config": True}
    quant_type = {"default": {"_type": kind, "_version": 2, "_data": data}}
    return {"quant_method": "torchao", "quant_type": quant_type, "include_input_output_embeddings": False,
            "modules_to_not_convert": None, "untie_embedding_weights": False, **more}  # fmt: skip


LLAMA_LAYERS = [
    f"model.layers.{layer}.{name}_proj"
    for layer in range(3)
    for name in (*(f"self_attn.{letter}" for letter in "qkvo"), *(f"mlp.{name}" for name in ("gate", "up", "down")))
]
BY_TOKEN = {"num_bits": 8, "strategy": "token", "dynamic": True, "symmetric": True}
CASES = {
    "awq": Case(
        "llama2_gqa",
        checkpoints.awq(8),
        {"quant_method": "awq", "bits": 4, "group_size": 8, "version": "gemm", "modules_to_not_convert": [DOWN]},
        {"left_out": [DOWN]},
    ),
    "awq by channel, of an older file": Case(
        "bloom_6_heads",
        checkpoints.awq(-1, zero_point=False),
        {"w_bit": 4, "q_group_size": -1, "zero_point": False, "version": "GEMM"},
        {"file": "quant_config.json"},
    ),
    "gptq": Case(
        "qwen2",
        checkpoints.gptq(4, 32, symmetric=False, in_order=True, version=1),  # 56 inputs end within a group
        {"bits": 4, "group_size": 32, "sym": False, "desc_act": False},
        {"file": "quantize_config.json"},
    ),
    "gptq, fused in the checkpoint": Case(
        "phi3",
        checkpoints.gptq(8, -1, symmetric=False, in_order=True, version=1),
        {"quant_method": "gptq", "bits": 8, "group_size": -1, "sym": False, "desc_act": False},
    ),
    "gptq in an order": Case(
        "llama2_gqa",
        checkpoints.gptq(4, 16, symmetric=True, in_order=False, version=1),
        {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": True, "desc_act": True},
    ),
    "gptq_v2 of 8 bits in an order": Case(
        "bloom_6_heads",
        checkpoints.gptq(8, 32, symmetric=False, in_order=False, version=2),
        {"quant_method": "gptq", "bits": 8, "group_size": 32, "sym": False, "desc_act": True,
         "checkpoint_format": "gptq_v2"},
    ),
    "AutoRound of several sorts": Case(
        "llama2_gqa",
        auto_round_mixed,
        auto_round(
            "auto_round:auto_gptq",
            extra_config={
                DOWN: {"bits": 8, "group_size": 16},
                r".*layers\.2\.self_attn.*": {"bits": 16, "data_type": "float", "group_size": None},
            },
        ),
        {"left_out": [f"model.layers.2.self_attn.{letter}_proj" for letter in "qkvo"]},
    ),
    "AutoRound, not symmetric": Case(
        "bloom_6_heads",
        checkpoints.without_index(checkpoints.gptq(4, 32, symmetric=False, in_order=True, version=2)),
        auto_round("auto_round", sym=False, block_name_to_quantize="transformer.h"),
    ),
    "AutoRound as AWQ": Case(
        "llama2_gqa",
        checkpoints.awq(8),
        auto_round("auto_round:auto_awq", sym=False, group_size=8, block_name_to_quantize=[["model.layers"]]),
    ),
    "W4A16": Case(
        "gemma3",
        checkpoints.packed(4, 8, symmetric=False),
        compressed({"num_bits": 4, "strategy": "group", "group_size": 8, "symmetric": False}, "pack-quantized",
                   ignore=["lm_head"]),
    ),
    "W8A16 in an order": Case(
        "llama2_gqa",
        checkpoints.packed(8, 8, symmetric=True, in_order=False),
        compressed({"num_bits": 8, "strategy": "group", "group_size": 8, "actorder": "group"}, "pack-quantized",
                   ignore=["re:.*lm_head"]),
    ),
    "W8A8": Case(
        "qwen3",
        checkpoints.int8_by_channel,
        compressed({"num_bits": 8, "strategy": "channel"}, "int-quantized", BY_TOKEN, ignore=["lm_head"]),
        rounded=checkpoints.int8_by_token,
    ),
    "FP8_DYNAMIC": Case(
        "bloom_6_heads",
        checkpoints.fp8_by_channel,
        compressed({"num_bits": 8, "type": "float", "strategy": "channel"}, "float-quantized",
                   BY_TOKEN | {"type": "float"}, ignore=["lm_head"]),
        rounded=checkpoints.fp8_by_token,
    ),
    "fp8, static": Case(
        "llama2_gqa",
        checkpoints.fp8_by_tensor(input_scale),
        {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]},
        rounded=fp8_static,
    ),
    "fp8, static, of transformers": Case(
        "llama2_gqa",
        checkpoints.changed(checkpoints.fp8_by_tensor(input_scale), by_transformers),
        {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None, "dequantize": False,
         "modules_to_not_convert": None, "modules_to_convert": None, "scale_fmt": "float", "expert_dtype": "fp8"},
        rounded=fp8_static,
    ),
    "modelopt": Case(
        "llama2_gqa",
        checkpoints.fp8_by_tensor(input_scale),
        {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm*"]}},
        {"file": "hf_quant_config.json"},
        rounded=fp8_static,
    ),
    "modelopt of several sorts": Case(
        "llama2_gqa",
        modelopt_mixed,
        {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": {
            name: {"quant_algo": "W8A16" if "mlp" in name else "FP8_PER_CHANNEL_PER_TOKEN"} for name in LLAMA_LAYERS
        }},
        rounded=lambda name, x: x if "mlp" in name else checkpoints.fp8_by_token(name, x),
    ),
    "modelopt in blocks": Case(
        "bloom_12_heads",
        checkpoints.changed(checkpoints.fp8_in_blocks, modelopt_blocks),
        {"quant_method": "modelopt", "quant_algo": "fp8_pb_wo", "ignore": ["lm_head"]},
    ),
    "fbgemm_fp8": Case(
        "llama2_gqa",
        checkpoints.fp8_by_channel,
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": [DOWN]},
        {"left_out": [DOWN]},
        rounded=lambda name, x: x if name == DOWN else checkpoints.fp8_by_token(name, x),
    ),
    "torchao, fp8": Case(
        "bloom_6_heads",
        checkpoints.changed(checkpoints.fp8_by_channel, by_torchao),
        torchao("Float8DynamicActivationFloat8WeightConfig", "PerRow", "PerRow"),
        rounded=checkpoints.fp8_by_token,
    ),
    "torchao, int8": Case(
        "llama2_gqa",
        checkpoints.changed(checkpoints.int8_by_channel, by_torchao),
        torchao("Int8WeightOnlyConfig", "PerRow", modules_to_not_convert=["lm_head", DOWN]),
        {"left_out": [DOWN]},
    ),
    "fp8 in blocks": Case(
        "bloom_12_heads",  # 192 inputs: a block and a half
        checkpoints.fp8_in_blocks,
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
        rounded=lambda name, x: torch.cat([checkpoints.fp8_by_token(name, part) for part in x.split(128, -1)], -1),
    ),
}  # fmt: skip


def write(directory, case: Case):
    return write_checkpoint(directory, case.family, case.store, case.config, **case.more)


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_dequantised_model(tmp_path, name):
    """Where activations are rounded, a last bit can decide whereto: a quarter of what rounding changes is allowed."""
    case = CASES[name]
    transformer = write(tmp_path, case)
    model = load_model(tmp_path)
    assert isinstance(model.layers[0].attention.qkv.weight, QuantizedWeight)
    assert isinstance(model.head.weight, torch.Tensor)
    if case.rounded is None:
        check_steps(model, transformer)
        return
    plain = transformer(torch.arange(9)[None]).logits
    round_inputs(transformer, case.rounded)
    difference = float((transformer(torch.arange(9)[None]).logits - plain).abs().max())
    check_steps(model, transformer, tolerance=difference / 4)


@pytest.mark.parametrize("name", ["gptq in an order", "awq", "W8A8"])
def test_greedy_tokens_are_those_of_the_dequantised_model(tmp_path, name):
    case = CASES[name]
    transformer = write(tmp_path, case)
    if case.rounded is not None:
        round_inputs(transformer, case.rounded)
    prompts = [random.Random(seed).choices(range(3, VOCAB), k=length) for seed, length in enumerate((1, 5, 21))]
    answers = run(load(tmp_path), prompts, SamplingParams(max_tokens=12), batch_max_tokens=9)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt])
        expected = transformer.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0
        )
        assert answer.token_ids == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    "name",
    [
        "awq by channel, of an older file",
        "gptq",
        "gptq, fused in the checkpoint",
        "W8A16 in an order",
        "fp8, static",
    ],
)
def test_ranks_together_compute_the_same_logits(tmp_path, name):
    """A rank of two has half of the 56 or 64 inputs of some matrices, which are whole groups of 8 or parts of one."""
    case = CASES[name]
    transformer = write(tmp_path, case)
    if name == "W8A16 in an order":
        with pytest.raises(ModelError, match=r"o_proj has groups in an order of its own .* allowed: tp = 1"):
            load_model(tmp_path, parallel=TensorParallel(0, 2))
        return
    if name == "gptq":
        with pytest.raises(
            ModelError, match=r"down_proj: tp = 2 gives a rank 28 of 56 .* int4 in groups of 32; allowed: 1"
        ):
            load_model(tmp_path, parallel=TensorParallel(0, 2))
        return
    if case.rounded is not None:
        round_inputs(transformer, case.rounded)
    tolerance = 1e-4 if case.rounded is None else 0.5
    run_ranks(
        2, lambda parallel: check_steps(load_model(tmp_path, parallel=parallel), transformer, tolerance=tolerance)
    )


def test_which_tp_works_is_told_before_anything_starts(tmp_path):
    write(tmp_path, CASES["gptq"])
    with pytest.raises(ModelError, match=r"tp is 2; allowed: 1, since .* and quantised weights, whose groups"):
        ModelConfig.from_directory(tmp_path).check_ranks(2)
    ModelConfig.from_directory(tmp_path).check_ranks(1)


@pytest.mark.parametrize("name", CASES)
def test_dummy_weights_are_like_those_that_are_not_quantised(tmp_path, name):
    write(tmp_path, CASES[name])
    config = ModelConfig.from_directory(tmp_path)
    model = model_class(config.architecture)(config, reference, TensorParallel(), torch.float32, CPU, 64)
    dummy_weights(model)
    weight = model.layers[0].attention.qkv.weight
    assert 0.01 < float(reference.dequantize(weight, torch.float32).std()) < 0.04
    assert all(bool(torch.isfinite(tensor.float()).all()) for tensor in weight.tensors())
    check_reads_nothing_back(tmp_path)


def test_a_quantised_head(tmp_path):
    """The head's rows are padded to those that two ranks share."""
    config = CASES["gptq_v2 of 8 bits in an order"].config | {"group_size": -1, "lm_head": True, "desc_act": False}
    store = checkpoints.gptq(8, -1, symmetric=False, in_order=True, version=2)
    transformer = write_checkpoint(tmp_path, "llama2_gqa", store, config, with_head=True)
    assert isinstance(load_model(tmp_path).head.weight, QuantizedWeight)
    check_steps(load_model(tmp_path), transformer)
    run_ranks(2, lambda parallel: check_steps(load_model(tmp_path, parallel=parallel), transformer))


@pytest.mark.skipif(not hasattr(torch, "float8_e8m0fnu"), reason="needs torch 2.7")
def test_scales_that_are_powers_of_two(tmp_path):
    """As transformers writes them for scale_fmt ue8m0."""

    def store(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        scales = checkpoints.fp8_in_blocks(name, weight)[0]["weight_scale_inv"].log2().ceil().exp2()
        by_weight = scales.repeat_interleave(128, 0)[: len(weight)].repeat_interleave(128, 1)[:, : weight.shape[1]]
        values = checkpoints.fp8(weight, by_weight)
        stored = {"weight": values, "weight_scale_inv": scales.to(torch.float8_e8m0fnu)}
        return stored, values.float() * by_weight

    case = CASES["fp8 in blocks"]
    transformer = write_checkpoint(tmp_path, case.family, store, case.config | {"scale_fmt": "ue8m0"})
    dry_load(tmp_path, tp=1)
    weight = load_model(tmp_path).layers[1].attention.output.weight
    (expected,) = (
        layer.weight for name, layer in linear_layers(transformer) if name.endswith("1.self_attention.dense")
    )
    assert torch.equal(reference.dequantize(weight, torch.float32), expected)


@pytest.mark.parametrize("name", ["fp8 in blocks", "fbgemm_fp8", "torchao, int8"])
def test_a_head_that_transformers_quantised(tmp_path, name):
    """It does so if `modules_to_not_convert` is a list that does not name the head."""
    case = CASES[name]
    config = case.config | {"modules_to_not_convert": [DOWN]}
    transformer = write_checkpoint(tmp_path, "llama2_gqa", case.store, config, left_out=[DOWN], with_head=True)
    dry_load(tmp_path, tp=1)
    head = load_model(tmp_path).head.weight
    assert isinstance(head, QuantizedWeight)
    assert torch.equal(reference.dequantize(head, torch.float32)[:VOCAB], transformer.lm_head.weight)


@pytest.mark.parametrize("name", ["fp8 in blocks", "fbgemm_fp8", "torchao, int8"])
def test_a_quantised_head_beside_a_list_that_names_it(tmp_path, name):
    case = CASES[name]
    config = case.config | {"modules_to_not_convert": ["lm_head"]}
    write_checkpoint(tmp_path, "llama2_gqa", case.store, config, with_head=True)
    for load_it in (load_model, lambda directory: dry_load(directory, tp=1)):
        with pytest.raises(
            ModelError, match=r"lm_head\._?weight_\w+ belongs to weights quantised with (scales|torchao)"
        ):
            load_it(tmp_path)


def test_the_memory_of_weights_is_that_of_their_tensors(tmp_path):
    write(tmp_path, CASES["awq"])
    engine = load(tmp_path)
    layer = sum(tensor.nbytes for tensor in load_model(tmp_path).layers[0].mlp.gate_up.weight.tensors())
    assert layer == 112 * 64 // 2 + 8 * 112 * (4 + 1)
    slots = load_model(tmp_path).weight_map()
    found = sum(
        slots[f"model.layers.0.mlp.{name}_proj.{part}"].nbytes
        for name in ("gate", "up")
        for part in ("qweight", "qzeros", "scales")
    )
    assert found == layer
    assert engine.info.memory["weights"] == sum(slot.nbytes for slot in slots.values())
    assert sum(slot.num_weights for slot in slots.values()) == sum(
        value.numel() for value in random_model("llama2_gqa").parameters()
    )


def test_an_engine_with_dummy_weights_needs_no_file(tmp_path):
    write(tmp_path, CASES["gptq in an order"])
    (tmp_path / "model.safetensors").unlink()
    engine = load(tmp_path, load_format="dummy")
    (answer,) = run(engine, [[1, 2, 3]], SamplingParams(max_tokens=4, ignore_eos=True))
    assert len(answer.token_ids) == 4
