# SPDX-License-Identifier: Apache-2.0
"""Quantised checkpoints whose tensors are broken, or contradict their configuration: the errors name both."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightllm_backend.models.dry_load import dry_load
from lightllm_backend.models.errors import ModelError
from lightllm_backend.parallel import TensorParallel
from tests.models.quantization import checkpoints
from tests.models.quantization.checkpoints import write_checkpoint
from tests.models.step_harness import load_model

Q, UP, DOWN = (f"model.layers.0.{name}" for name in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"))
AWQ = (checkpoints.awq(8), {"quant_method": "awq", "group_size": 8})
GPTQ = (
    checkpoints.gptq(4, 8, symmetric=True, in_order=True, version=1),
    {"quant_method": "gptq", "bits": 4, "group_size": 8, "sym": True, "desc_act": False},
)
ORDERED = (
    checkpoints.gptq(4, 8, symmetric=True, in_order=False, version=1),
    {"quant_method": "gptq", "bits": 4, "group_size": 8, "sym": True, "desc_act": True},
)
PACKED = (
    checkpoints.packed(4, 8, symmetric=True),
    {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"all": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 8}}},
        "ignore": ["lm_head"],
    },
)
# All but the down projections.
PACKED_UP = PACKED[1]["config_groups"]["all"] | {"targets": ["re:.*(q|k|v|o|gate|up)_proj"]}
FP8 = (checkpoints.fp8_by_tensor(lambda name: 0.02), {"quant_method": "fp8", "activation_scheme": "static"})

INT8 = (
    checkpoints.int8_by_channel,
    {
        "quant_method": "torchao",
        "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {"group_size": None}}},
    },
)


@pytest.fixture
def write(tmp_path):
    def written(kind, change=lambda tensors: {}, **more):
        store, config = kind
        write_checkpoint(tmp_path, "llama2_gqa", store, config | more)
        tensors = load_file(tmp_path / "model.safetensors")
        tensors |= change(tensors)
        save_file({name: value for name, value in tensors.items() if value is not None}, tmp_path / "model.safetensors")
        return tmp_path

    return written


@pytest.mark.parametrize(
    ("kind", "name", "change", "message"),
    [
        (
            AWQ,
            f"{Q}.qweight",
            lambda value: value[:, :-1].clone(),
            r"has the shape \[64, 7\]; config.json makes it \[64, 8\]",
        ),
        (
            AWQ,
            f"{Q}.qzeros",
            lambda value: value[:-1].clone(),
            r"has the shape \[7, 8\]; config.json makes it \[8, 8\]",
        ),
        (
            AWQ,
            f"{UP}.scales",
            lambda value: value.t().contiguous(),
            r"has the shape \[56, 8\]; config.json makes it \[8, 56\]",
        ),
        (AWQ, f"{UP}.scales", lambda value: value * torch.nan, "holds NaN or an infinite number; finite numbers"),
        (AWQ, f"{UP}.qweight", torch.Tensor.float, "has the dtype float32; int32 is needed"),
        (
            GPTQ,
            f"{DOWN}.qweight",
            lambda value: value[:-1].clone(),
            r"has the shape \[6, 64\]; config.json makes it \[7, 64\]",
        ),
        (
            GPTQ,
            f"{Q}.qzeros",
            lambda value: value + 1,
            "contradicts config.json; sym is true, so all zero points of gptq",
        ),
        (GPTQ, f"{Q}.g_idx", lambda value: value.flip(0), "contradicts config.json; desc_act is false, so groups of 8"),
        (GPTQ, f"{Q}.bias", lambda value: torch.ones(64), "contradicts config.json; the layer has no bias: zeros"),
        (ORDERED, f"{Q}.g_idx", lambda value: value.clamp_max(5), "does not give each of 8 groups 8 input features"),
        (
            ORDERED,
            f"{Q}.g_idx",
            lambda value: value.flip(0),
            "differs from that of a matrix that is multiplied by the same",
        ),
        (
            PACKED,
            f"{Q}.weight_shape",
            lambda value: value * 2,
            r"contradicts config.json; the shape \[64, 64\] is needed",
        ),
        (
            PACKED,
            f"{Q}.weight_packed",
            lambda value: value[:, 1:].clone(),
            r"has the shape \[64, 7\]; config.json makes it",
        ),
        (
            INT8,
            f"{Q}._weight_zero_point",
            lambda value: torch.ones(64, 1, dtype=torch.int8),
            "contradicts config.json; zeros are needed",
        ),
        (FP8, f"{Q}.weight", lambda value: value.view(torch.int8), "has the dtype int8; float8_e4m3fn is needed"),
        (FP8, f"{Q}.weight_scale", lambda value: torch.ones(64), r"has the shape \[64\]; config.json makes it \[\]"),
        (FP8, f"{Q}.input_scale", lambda value: value * torch.inf, "holds NaN or an infinite number; finite numbers"),
        (FP8, f"{Q}.input_scale", torch.zeros_like, f"{Q}.input_scale is 0; a finite number above 0 is needed"),
        (FP8, f"{Q}.input_scale", lambda value: -value, "input_scale is -.*; a finite number above 0 is needed"),
        (FP8, f"{Q}.input_scale", lambda value: None, rf"tensors are missing, 1 in all: {Q}.input_scale"),
    ],
)
def test_a_broken_tensor_is_named(write, kind, name, change, message):
    """Before anything starts, unless only its values tell."""
    directory = write(kind, lambda tensors: {name: change(tensors.get(name))})
    with pytest.raises(ModelError, match=rf"{name}.*{message}|{message}") as in_the_worker:
        load_model(directory)
    if not any(told in message for told in ("has the shape", "has the dtype", "tensors are missing")):
        dry_load(directory, tp=1)
        return
    with pytest.raises(ModelError) as at_launch:
        dry_load(directory, tp=1)
    assert str(at_launch.value) == str(in_the_worker.value)


def test_a_bias_of_zeros_is_that_of_autogptq(write):
    load_model(write(GPTQ, lambda tensors: {f"{Q}.bias": torch.zeros(64)}))


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        (AWQ, {"group_size": 16}, f"{DOWN} has 56 input features; a multiple of 16 is needed: int4 in groups of 16"),
        (
            AWQ,
            {"modules_to_not_convert": ["self_attn.k_proj"]},
            r"k_proj and self_attn.q_proj are quantised differently \(/.*modules_to_not_convert leaves out .*k_proj by",
        ),
        (
            AWQ,
            {"modules_to_not_convert": ["down_proj"]},
            rf"{DOWN}.q.* GPTQ or AWQ, but /.*/config.json: .*not_convert leaves out {DOWN} by 'down_proj'; a quantiz",
        ),
        (FP8, {"ignored_layers": ["re:", ".*up_proj"]}, f"ignored_layers leaves out {UP} by '.*up_proj'"),
        (
            FP8,
            {"modules_to_not_convert": [DOWN]},
            f"config.modules_to_not_convert leaves out {DOWN} by '{DOWN}'; a quan",
        ),
        (PACKED, {"ignore": ["re:.*down_proj"]}, f"quantization_config.ignore leaves out {DOWN} by '.*down_proj'; a"),
        (
            PACKED,
            {"config_groups": {"all": PACKED_UP}},
            f"quantization_config.config_groups leaves out {DOWN}; a quant",
        ),
        (GPTQ, {"dynamic": {"-:.*down_proj": {}}}, rf"dynamic.-:.*down_proj leaves out {DOWN} by '.*down_proj'; a"),
        (
            GPTQ,
            {"modules_in_block_to_quantize": ["self_attn"]},
            f"modules_in_block_to_quantize leaves out {DOWN}; a quan",
        ),
        (INT8, {"modules_to_not_convert": ["down_proj.weight"]}, f"leaves out {DOWN} by 'down_proj.weight'; a quan"),
        (GPTQ, {"lm_head": True}, "says that lm_head is quantised, while they have it in floats"),
        (GPTQ, {"bits": 8}, r"has the shape \[\d+, \d+\]; config.json makes it \[\d+, \d+\]"),
        (GPTQ, {"sym": False, "checkpoint_format": "gptq_v2", "desc_act": True}, None),  # they say the same
        (AWQ, {"quant_method": "gptq"}, r"has the shape \[56, 8\]; config.json makes it \[7, 64\]"),
    ],
)
def test_a_configuration_of_other_tensors(write, kind, more, message):
    directory = write(kind, **more)
    if message is None:
        dry_load(directory, tp=1)
        load_model(directory)
        return
    for load in (load_model, lambda directory: dry_load(directory, tp=1)):
        with pytest.raises(ModelError, match=message):
            load(directory)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(("bits", "numbers"), [(0x7F, 1), (0xFF, 3)])
def test_fp8_weights_that_are_nan_are_counted(write, bits, numbers, tp):
    """Both of fp8's NaNs. The rest of the bytes are the greatest and least finite numbers."""

    def change(tensors):
        weight = torch.tensor([0x7E, 0xFE, 0x00, 0x80], dtype=torch.uint8).repeat(64, 16)
        weight[5, :numbers] = bits
        return {f"{Q}.weight": weight.view(torch.float8_e4m3fn)}

    directory = write(FP8, change)
    unlike = "a number that is" if numbers == 1 else "3 numbers that are"
    expected = rf"model\.safetensors: {Q}\.weight holds {unlike} NaN in float8_e4m3fn; finite numbers are needed$"
    with pytest.raises(ModelError, match=expected):
        load_model(directory, parallel=TensorParallel(0, tp))
    if tp == 2:
        load_model(directory, parallel=TensorParallel(1, 2))  # holds other rows


def test_scales_of_k_and_v_are_said_to_be_ignored(write, caplog):
    directory = write(FP8, lambda tensors: {f"{Q[:-6]}{name}": torch.ones(1) for name in ("k_scale", "k_proj.v_scale")})
    load_model(directory)
    assert "2 scales for K and V, like model.layers.0.self_attn.k" in caplog.text
    assert "are not used" in caplog.text


def test_scales_beyond_float16(write):
    directory = write(AWQ, lambda tensors: {f"{Q}.scales": tensors[f"{Q}.scales"].float() * 1e6})
    load_model(directory)
    with pytest.raises(
        ModelError, match=rf"{Q}\.scales holds a number too large; finite numbers are needed in torch.float16"
    ):
        load_model(directory, dtype=torch.float16)
