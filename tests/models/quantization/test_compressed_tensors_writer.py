# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that compressed-tensors itself writes, against its own dequantised model, in float32."""

from __future__ import annotations

import pytest
import torch

from tests.models.quantization.checkpoints import int8_by_token, linear_layers, round_inputs
from tests.models.random_models import random_model
from tests.models.step_harness import check_steps, load_model

pytest.importorskip("compressed_tensors")

from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from compressed_tensors.quantization.utils import calculate_qparams

GROUP = 8  # divides 64 and 56


def parts_of(weight, strategy):
    """The weights that share a scale, in the last dimension."""
    if strategy == "block":  # of 128 x 128, which divide the weight
        rows, columns = (size // 128 for size in weight.shape)
        return weight.reshape(rows, 128, columns, 128).transpose(1, 2).flatten(2)
    sizes = {"group": (len(weight), -1, GROUP), "channel": (len(weight), 1, -1)}
    return weight.reshape(sizes.get(strategy, (1, 1, -1)))


def write(directory, scheme, family):
    """Returns the dequantised model, whose layers round their inputs as the scheme says."""
    model = random_model(family)
    config = QuantizationConfig(config_groups={scheme: ["Linear"]}, ignore=["lm_head"])
    (group,) = config.config_groups.values()
    if group.weights.strategy == "group":
        group.weights.group_size = GROUP
    apply_quantization_config(model, config)
    with torch.no_grad():
        for _, module in linear_layers(model):
            shape = module.weight_scale.shape
            parts = parts_of(module.weight, group.weights.strategy)
            scale, zero_point = calculate_qparams(parts.amin(-1), parts.amax(-1), group.weights)
            module.weight_scale.copy_(scale.reshape(shape))
            if hasattr(module, "weight_zero_point"):
                module.weight_zero_point.copy_(zero_point.reshape(shape))
            if hasattr(module, "input_scale"):
                module.input_scale.fill_(0.02)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(directory)
    compressor.update_config(directory)
    compressor.decompress_model(model)
    if scheme == "W8A8":
        # Its scale is a token's largest magnitude / 127.5, ours and vLLM's that / 127.
        for _, module in linear_layers(model):
            module.quantization_enabled = False
        round_inputs(model, int8_by_token)
    return model


@pytest.mark.parametrize(
    ("scheme", "family", "tolerance"),
    [
        ("W4A16", "qwen2", 1e-4),
        ("W4A16_ASYM", "qwen2", 1e-4),
        ("W8A16", "qwen2", 1e-4),
        # Where inputs are rounded, a last bit can decide whereto.
        ("W8A8", "qwen2", 0.3),
        ("FP8", "qwen2", 0.3),
        ("FP8_DYNAMIC", "qwen2", 0.3),
        ("FP8_BLOCK", "bloom_8_heads", 0.3),
    ],
)
def test_logits_are_those_of_the_dequantised_model(tmp_path, scheme, family, tolerance):
    transformer = write(tmp_path, scheme, family)
    check_steps(load_model(tmp_path), transformer, tolerance=tolerance)
