# SPDX-License-Identifier: Apache-2.0
"""quantize_tokens: activations in 8 bits, by token, by token and group, or by a scale of the checkpoint."""

from dataclasses import replace

import pytest
import torch

from lightllm_backend.kernels import launchers, reference
from lightllm_backend.kernels.quantized.weight import LIMITS
from tests.kernels.quantized_weights import random_weight


@pytest.mark.parametrize("is_static", [False, True])
@pytest.mark.parametrize(
    ("kind", "in_features", "group_size"), [("int8", 130, 130), ("fp8", 130, 130), ("fp8", 200, 128)]
)
def test_activations_in_8_bits(kind, in_features, group_size, is_static, device):
    weight = random_weight(kind, 3, in_features, group_size, device)
    limit = LIMITS[weight.values.dtype]
    if is_static:  # the largest activations lie beyond its range
        weight = replace(weight, input_scale=torch.full((1,), 2.0 / limit, device=device))
    x = torch.randn(5, in_features + 8, device=device)[:, :in_features]
    x[3] = 0.0
    values, scales = reference.quantize_tokens(x, weight)
    assert values.dtype == weight.values.dtype
    columns = torch.arange(in_features, device=device) // group_size
    meant = values.float() * scales[:, columns]
    step = scales[:, columns] * (0.5 if kind == "int8" else 0.0) + x.abs() * (0.0 if kind == "int8" else 1 / 16)
    inside = x.abs() <= scales[:, columns] * limit
    assert bool(inside.all()) != is_static
    assert bool(((meant - x).abs() <= step + 1e-6)[inside].all())
    least = -128 if kind == "int8" else -limit
    assert bool((meant <= scales[:, columns] * limit * 1.001).all())
    assert bool((meant >= scales[:, columns] * least * 1.001).all())
    assert values.float().min() == least or not is_static
    got_values, got_scales = launchers.quantize_tokens(x, weight)
    torch.testing.assert_close(got_scales, scales, rtol=1e-6, atol=0)
    got, expected = got_values.float(), values.float()
    if kind == "fp8" and device.type == "cpu":  # the interpreter (3.9) loses the carry of a fraction rounded up to 2
        compared = expected.abs().frexp().mantissa != 0.5
        got, expected = got[compared], expected[compared]
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert launchers.quantize_tokens(x[:0], weight)[0].shape == (0, in_features)
