# SPDX-License-Identifier: Apache-2.0
"""RoundedTokens: memory for whole tiles, which cuBLAS multiplies, and products of the tokens alone."""

from dataclasses import replace

import pytest
import torch

from lightllm_backend.kernels import launchers
from lightllm_backend.kernels.activation.silu_and_mul import rounded_silu_and_mul
from lightllm_backend.kernels.quantized import product
from lightllm_backend.kernels.quantized.rounded_tokens import TILE_TOKENS, RoundedTokens
from tests.kernels.kernel_harness import relative_error
from tests.kernels.quantized_weights import exact, random_weight


def readers_weight(device):
    return replace(random_weight("fp8", 48, 64, 64, device), quantizes_input=True, in_fragments=True)


@pytest.mark.parametrize("tokens", [0, 5, TILE_TOKENS, TILE_TOKENS + 1])
def test_what_kernels_round_has_memory_for_whole_tiles(tokens, device):
    gate_up = torch.randn(tokens, 128, device=device).half()
    x = launchers.silu_and_mul(gate_up)
    reader = readers_weight(device)
    for rounded in (
        RoundedTokens(*launchers.quantize_tokens(x, reader), x.dtype),
        rounded_silu_and_mul(gate_up, False, reader),
    ):
        assert (rounded.shape, rounded.scales.shape) == ((tokens, 64), (tokens, 1))
        values, scales = rounded.whole_tiles()
        assert len(values) == len(scales) == -(-tokens // TILE_TOKENS) * TILE_TOKENS
        assert torch.equal(values[:tokens].view(torch.int8), rounded.values.view(torch.int8))
        assert torch.equal(scales[:tokens], rounded.scales)


def test_cublas_multiplies_whole_tiles(monkeypatch, device):
    """cuBLAS itself runs in tests/gpu."""
    taken = []

    def scaled_mm(values, whole, scales, by_row, bias, out_dtype, use_fast_accum):
        taken.append(len(values))
        return (values.float() * scales @ (whole.float() * by_row) + bias).to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    monkeypatch.setattr(product, "_suits_cublas", lambda *_: True)
    monkeypatch.setattr(product, "multiplies_8_bits", lambda *_: True)
    weight = replace(random_weight("fp8", 48, 64, 64, device), quantizes_input=True)
    x, bias = torch.randn(70, 64, device=device).bfloat16(), torch.randn(48, device=device)
    out = launchers.linear(x, weight, bias)
    assert taken == [TILE_TOKENS]
    assert out.shape == (70, 48)
    assert relative_error(out.double(), x.double() @ exact(weight).t() + bias.double()) < 0.05
