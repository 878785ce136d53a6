# SPDX-License-Identifier: Apache-2.0
"""quantized_splits, and the choice among the kernels for a weight of 4 or 8 bits."""

from dataclasses import replace

import pytest
import torch

from lightllm_backend.kernels import launchers, reference
from lightllm_backend.kernels.quantized import product
from lightllm_backend.kernels.quantized.quantized_splits import MAX_TILE_TOKENS
from tests.kernels.kernel_harness import TOLERANCE, relative_error
from tests.kernels.quantized_weights import exact, random_weight

DTYPE = torch.float16  # see test_linear


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("tokens", "kind", "out_features", "in_features", "group_size", "with_zeros"),
    [
        (3, "int4", 64, 512, 128, True),  # split
        (17, "int4", 500, 96, 32, False),
        (1, "int4", 72, 136, 136, False),  # a scale per channel; no block divides the columns
        (2, "int8", 40, 192, 64, True),
        (70, "int8", 72, 130, 130, False),  # more than one tile of tokens
        (5, "fp8", 200, 200, 128, False),  # the last group is cut short
        (2, "int4", 24, 48, 24, True),  # no power of two divides the groups: dequantised
    ],
)
def test_parts_add_up(tokens, kind, out_features, in_features, group_size, with_zeros, with_bias, device):
    weight = random_weight(kind, out_features, in_features, group_size, device, with_zeros)
    x = torch.randn(tokens, in_features + 8, device=device).to(DTYPE)[:, :in_features]
    bias = torch.randn(out_features, device=device).to(DTYPE) if with_bias else None
    expected = x.double() @ exact(weight).t() + (0 if bias is None else bias.double())
    parts = launchers.quantized_splits(x, weight, bias)
    assert parts.dtype == (DTYPE if len(parts) == 1 else torch.float32)
    assert relative_error(parts.float().sum(0), expected) < TOLERANCE[DTYPE]
    assert (
        relative_error(
            reference.quantized_splits(x.float(), weight, None if bias is None else bias.float())[0], expected
        )
        < 1e-5
    )
    assert len(launchers.quantized_splits(x[:0], weight, bias)[0]) == 0


@pytest.mark.parametrize("tokens", [2, MAX_TILE_TOKENS + 1])
@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
def test_products_take_quantised_weights(kind, tokens, device):
    """Each of the three, for few tokens and many, with columns in another order."""
    weight = random_weight(kind, 64, 128, 128, device)
    order = torch.randperm(128, device=device).to(torch.int32)
    x, bias = torch.randn(tokens, 128, device=device).to(DTYPE), torch.randn(64, device=device).to(DTYPE)
    expected = x[:, order].double() @ exact(weight).t() + bias.double()
    weight = replace(weight, order=order)
    out = torch.full((tokens, 64), torch.nan, dtype=DTYPE, device=device)
    for kernels in (launchers, reference):
        assert relative_error(kernels.linear(x, weight, bias), expected) < TOLERANCE[DTYPE]
        assert kernels.linear(x, weight, bias, out) is out
        assert relative_error(out, expected) < TOLERANCE[DTYPE]
        assert relative_error(kernels.linear_splits(x, weight, bias).float().sum(0), expected) < TOLERANCE[DTYPE]
        gated = reference.silu_and_mul(expected.float())
        assert relative_error(kernels.gated_linear(x, weight, bias), gated) < 2 * TOLERANCE[DTYPE]


@pytest.mark.parametrize(
    ("kind", "capability", "tokens", "is_rounded"),
    [
        ("fp8", (8, 9), MAX_TILE_TOKENS + 1, True),
        ("fp8", (8, 9), MAX_TILE_TOKENS, False),
        ("fp8", (8, 6), MAX_TILE_TOKENS + 1, False),
        ("int8", (8, 0), MAX_TILE_TOKENS + 1, True),
        ("int8", (7, 5), MAX_TILE_TOKENS + 1, False),
    ],
)
def test_activations_are_rounded_where_that_is_quicker(kind, capability, tokens, is_rounded, monkeypatch, device):
    monkeypatch.setattr(product, "compute_capability", lambda device: capability)
    calls = []
    monkeypatch.setattr(
        product, "quantize_tokens", lambda *arguments: calls.append("") or reference.quantize_tokens(*arguments)
    )
    monkeypatch.setattr(product, "scaled_linear", reference.scaled_linear)
    weight = replace(random_weight(kind, 32, 64, 64, device), quantizes_input=True)
    x = torch.randn(tokens, 64, device=device).to(DTYPE)
    assert relative_error(launchers.linear(x, weight), x.double() @ exact(weight).t()) < 0.05
    assert bool(calls) == is_rounded
