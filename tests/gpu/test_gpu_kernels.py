# SPDX-License-Identifier: Apache-2.0
"""Every kernel on a GPU, at the shapes of real models, against its reference in float32."""

import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightllm_backend.kernels import launchers, reference
from lightllm_backend.kernels.attention.whole_prompt_tiles import WholePromptTiles
from lightllm_backend.kernels.hardware import GLUON_TRIED
from lightllm_backend.kernels.linear.choice import LinearBlocks
from lightllm_backend.kernels.norm.rms_norm import paired_rms_norm
from lightllm_backend.kernels.quantized.choice import PrefetchBlocks, has_16_bit_parts
from lightllm_backend.kernels.quantized.fragments import into_fragments
from lightllm_backend.runner.prompt_tiling import order_tiles
from tests.kernels.kernel_harness import (
    TOLERANCE,
    Pool,
    Variant,
    head_norm,
    make_pool,
    new_tokens,
    relative_error,
    split_new,
    starts_of,
)
from tests.kernels.quantized_weights import random_weight

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1",
        reason="needs an NVIDIA GPU, and kernels that are not interpreted",
    ),
]

DEVICE = torch.device("cuda")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
# Heads, KV heads and head_dim.
LLAMA_7B, LLAMA_70B, SMOLLM2 = (32, 32, 128), (64, 8, 128), (9, 3, 64)
BLOOM_560M, BLOOM_176B_TP8, MISTRAL_7B = (16, 16, 64), (14, 14, 128), (32, 8, 128)
# Output and input features: of LLaMA-7B, of BLOOM-7B1 and LLaMA-3-8B, of SmolLM2.
PRODUCTS = [(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008), (32000, 4096)]
PRODUCTS += [(16384, 4096), (6144, 4096), (576, 1536)]
INT8 = Variant(int8=True)
VARIANTS = pytest.mark.parametrize(
    ("shape", "variant"),
    [
        (BLOOM_560M, Variant(alibi=True)),
        (BLOOM_176B_TP8, Variant(alibi=True)),
        (BLOOM_176B_TP8, Variant(alibi=True, int8=True)),
        (MISTRAL_7B, Variant(window=4096)),
        (MISTRAL_7B, Variant(window=1000)),
        (MISTRAL_7B, Variant(window=100, int8=True)),
        (LLAMA_7B, INT8),
        (LLAMA_70B, INT8),
        (SMOLLM2, INT8),
        ((8, 8, 80), INT8),
        ((16, 8, 256), Variant(window=4096, soft_cap=1.5)),
        ((16, 8, 256), Variant(int8=True, soft_cap=1.5)),
    ],
)


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Memory that nobody has written holds NaN, and the reference computes in whole float32."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    with sdpa_kernel(SDPBackend.MATH):
        yield
    torch.use_deterministic_algorithms(False)
    torch.cuda.empty_cache()


def _random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def _wide(pool: Pool) -> tuple[Tensor, Tensor]:
    pool = pool.to(torch.float32)
    return pool.k, pool.v


def _variant(pool: Pool, variant: Variant, heads: int) -> tuple[Pool, dict[str, Any], dict[str, Any]]:
    """The pool, and the options for the kernel on it and for the reference on its wide values."""
    pool = pool.to_int8() if variant.int8 else pool
    options = variant.options(pool, heads)
    return pool, options, options | {"scales": None}


@DTYPES
@pytest.mark.parametrize(("tokens", "dim"), [(1, 4096), (256, 4096), (8192, 4096), (7, 576), (33, 8192)])
@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm(dtype: torch.dtype, tokens: int, dim: int, with_residual: bool) -> None:
    x, weight = _random(tokens, dim, dtype=dtype), _random(dim, dtype=dtype)
    residual = _random(tokens, dim, dtype=dtype) if with_residual else None
    # What is normalised is the residual as it is stored.
    total = x if residual is None else (x.float() + residual.float()).to(dtype)
    out = launchers.rms_norm(x, weight, 1e-5, residual)
    assert residual is None or torch.equal(residual, total)
    assert relative_error(out, reference.rms_norm(total.float(), weight.float(), 1e-5)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("parts", "tokens", "dim"), [(1, 1, 3840), (3, 33, 2304), (1, 700, 5376)])
def test_rms_norm_with_a_post_norm(dtype: torch.dtype, parts: int, tokens: int, dim: int) -> None:
    """Weights of float32, as Gemma has them."""
    x, residual = _random(parts, tokens, dim, dtype=torch.float32), _random(tokens, dim, dtype=dtype)
    weight, post_weight = _random(2, dim, dtype=torch.float32)
    expected_residual = residual.float()
    expected = reference.rms_norm(x.sum(0), weight, 1e-6, expected_residual, post_weight)
    out = launchers.rms_norm(x, weight, 1e-6, residual, post_weight)
    assert out.dtype == dtype
    assert relative_error(residual, expected_residual) < TOLERANCE[dtype]
    assert relative_error(out, expected) < 2 * TOLERANCE[dtype]


@DTYPES
@pytest.mark.parametrize("is_gelu", [False, True])
@pytest.mark.parametrize(("tokens", "features"), [(1, 11008), (256, 11008), (4096, 11008), (5, 1536), (64, 3584)])
def test_silu_and_mul(dtype: torch.dtype, tokens: int, features: int, is_gelu: bool) -> None:
    gate_up = _random(tokens, 2 * features, dtype=dtype)
    expected = reference.silu_and_mul(gate_up.float(), is_gelu)
    assert relative_error(launchers.silu_and_mul(gate_up, is_gelu), expected) < TOLERANCE[dtype]


@DTYPES
@pytest.mark.parametrize("tokens", [1, 2, 8, 17, 32, 33, 64, 65, 128, 200, 257])
@pytest.mark.parametrize(
    "shape",
    [
        (12288, 4096),
        (4096, 4096),
        (22016, 4096),
        (4096, 11008),
        (32000, 4096),
        (16384, 4096),
        (6144, 4096),
        (576, 1536),
    ],
)
def test_linear(dtype: torch.dtype, tokens: int, shape: tuple[int, int]) -> None:
    x, weight, bias = (
        _random(tokens, shape[1], dtype=dtype),
        _random(*shape, dtype=dtype),
        _random(shape[0], dtype=dtype),
    )
    expected = reference.linear(x.float(), weight.float(), bias.float())
    assert relative_error(launchers.linear(x, weight, bias), expected) < TOLERANCE[dtype]
    parts = launchers.linear_splits(x, weight, bias)
    assert relative_error(parts.float().sum(0), expected) < TOLERANCE[dtype]
    norm = launchers.rms_norm(parts, torch.ones(shape[0], dtype=dtype, device=DEVICE), 1e-5)
    assert (
        relative_error(norm, reference.rms_norm(expected, torch.ones(shape[0], device=DEVICE), 1e-5)) < TOLERANCE[dtype]
    )


@DTYPES
@pytest.mark.parametrize("tokens", [1, 8, 17, 32, 64, 65, 128, 200])
@pytest.mark.parametrize("shape", [(11008, 4096), (14336, 4096), (1536, 576), (3584, 8192)])
def test_gated_linear(dtype: torch.dtype, tokens: int, shape: tuple[int, int]) -> None:
    features, in_features = shape
    x, weight = _random(tokens, in_features, dtype=dtype), _random(2 * features, in_features, dtype=dtype)
    weight /= in_features**0.5
    for is_gelu in (False, True):
        expected = reference.gated_linear(x.float(), weight.float(), is_gelu=is_gelu)
        assert relative_error(launchers.gated_linear(x, weight, is_gelu=is_gelu), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
@pytest.mark.parametrize("tokens", [1, 17, 64, 65, 290, 700])
@pytest.mark.parametrize("shape", [(12288, 4096), (4096, 11008), (576, 1536)])
def test_linear_with_weights_of_4_and_8_bits(
    dtype: torch.dtype, kind: str, tokens: int, shape: tuple[int, int]
) -> None:
    """As they are, and with activations of 8 bits, whose error is that of their own rounding."""
    for group_size in (128, shape[1]):
        weight = random_weight(kind, *shape, group_size, DEVICE, with_zeros=kind == "int4")
        x, bias = _random(tokens, shape[1], dtype=dtype), _random(shape[0], dtype=dtype)
        expected = reference.linear(x.float(), weight, bias.float())
        assert relative_error(launchers.linear(x, weight, bias), expected) < TOLERANCE[dtype]
        parts = launchers.linear_splits(x, weight, bias)
        assert relative_error(parts.float().sum(0), expected) < TOLERANCE[dtype]
        if kind != "int4" and (kind == "fp8" or group_size == shape[1]):
            weight = replace(weight, quantizes_input=True)
            assert relative_error(launchers.linear(x, weight, bias), expected) < 0.05
        dense = reference.dequantize(weight, dtype)
        assert torch.equal(launchers.dequantize(into_fragments(weight), dtype), dense)


@pytest.mark.skipif(
    not GLUON_TRIED or not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a Hopper GPU, and a Triton-lang whose Gluon was tried",
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("features", "in_features", "splits", "is_gated"), [(456, 1024, 2, False), (344, 768, 1, True), (64, 64, 1, False)]
)
@pytest.mark.parametrize(
    ("tokens", "blocks"),
    [(1, (64, 64, 3, 4, 3)), (30, (128, 64, 4, 4, 1)), (64, (128, 64, 3, 8, 2)), (100, (64, 64, 5, 4, 1))],
)
def test_products_whose_weights_are_copied_ahead(
    tokens: int,
    blocks: tuple[int, ...],
    features: int,
    in_features: int,
    splits: int,
    is_gated: bool,
    with_bias: bool,
    dtype: torch.dtype,
) -> None:
    """Behind the kernel that writes what they read, twice; sizes that fill no tile, and of fewer steps than stages."""
    from lightllm_backend.kernels.linear.linear_prefetch import launch_prefetch

    rows = features * (2 if is_gated else 1)
    weight = (torch.randn(rows, in_features, device=DEVICE) / in_features**0.5).to(dtype)
    bias = torch.randn(rows, device=DEVICE).to(dtype) if with_bias else None
    scale = torch.ones(in_features, device=DEVICE, dtype=dtype)
    *cut, programs_per_sm = blocks
    for _ in range(2):
        inputs = torch.randn(tokens, in_features, device=DEVICE).to(dtype)
        out = torch.full((splits * tokens * features + 1024,), 7.0, device=DEVICE, dtype=torch.float32)
        out = out if splits > 1 else out.to(dtype)
        x = launchers.rms_norm(inputs, scale, 1e-5)
        parts = out[:-1024].view(splits, tokens, features)
        is_gelu = is_gated and with_bias
        launch_prefetch(x, weight, bias, parts, LinearBlocks(*cut, splits, programs_per_sm), is_gated, is_gelu)
        product = partial(reference.gated_linear, is_gelu=is_gelu) if is_gated else reference.linear
        expected = product(x.float(), weight.float(), None if bias is None else bias.float())
        assert relative_error(parts.float().sum(0), expected) < TOLERANCE[dtype]
        assert bool((out[-1024:] == 7).all()), "nothing is written behind the result"


@pytest.mark.skipif(
    not GLUON_TRIED or not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a Hopper GPU, and a Triton-lang whose Gluon was tried",
)
@pytest.mark.parametrize(
    ("tokens", "blocks"),
    [
        (1, (64, 128, 4, 4, 1, 1, 2)),
        (8, (64, 256, 4, 4, 2, 2, 2)),
        (30, (128, 128, 3, 4, 1, 1, 1)),
        (17, (64, 256, 3, 4, 1, 2, 2)),
        (64, (128, 128, 4, 4, 2, 1, 1)),
        (63, (256, 128, 2, 16, 1, 2, 1)),
        (100, (64, 64, 4, 4, 2, 1, 1)),
        (128, (64, 256, 2, 4, 1, 2, 1)),
        (200, (128, 128, 2, 8, 1, 1, 1)),
        (256, (128, 64, 3, 8, 1, 1, 1, 256)),
        (255, (64, 128, 2, 4, 1, 2, 1, 256)),
        (33, (128, 128, 3, 4, 1, 1, 1, 128, 256)),
        (60, (64, 128, 4, 4, 2, 2, 1, 128, 128)),
        (20, (192, 128, 4, 4, 1, 1, 1, 128, 512)),
        (128, (192, 128, 3, 4, 1, 3, 1)),
        (200, (192, 128, 3, 4, 1, 1, 1)),
    ],
)
@pytest.mark.parametrize(
    ("kind", "group_size", "with_zeros", "is_direct"),
    [
        ("int4", 128, False, False),
        ("int4", 64, True, False),
        ("int4", 1024, False, False),
        ("int8", 1024, False, False),
        ("int8", 128, True, False),
        ("fp8", 1024, False, False),
        ("fp8", 128, False, False),
        ("fp8", 1024, False, True),
    ],
)
def test_quantised_weights_are_decoded_on_their_way(
    kind: str, group_size: int, with_zeros: bool, is_direct: bool, tokens: int, blocks: tuple[int, ...]
) -> None:
    """Behind the kernel that writes what they read, several times, since nothing but time orders what may be wrong."""
    from lightllm_backend.kernels.quantized.quantized_prefetch import launch_quantized_prefetch

    cut = PrefetchBlocks(*blocks)
    for is_gated, dtype in ((False, torch.bfloat16), (False, torch.float16), (True, torch.bfloat16)):
        cut = cut._replace(splits=1 if is_gated else cut.splits)
        features, in_features = 464, 1024
        rows = features * (2 if is_gated else 1)
        plain = random_weight(kind, rows, in_features, group_size, DEVICE, with_zeros)
        dense = reference.dequantize(plain, torch.float32)
        weight = replace(into_fragments(plain), quantizes_input=is_direct)
        bias = torch.randn(rows, device=DEVICE).to(dtype)
        inputs = torch.randn(tokens, in_features, device=DEVICE).to(dtype)
        is_gelu = cut.splits == 1 and tokens > 8 and (is_gated or dtype == torch.float16)
        product = partial(reference.gated_linear if is_gated else reference.linear, is_gelu=is_gelu)
        results = []
        for _ in range(20):
            x = launchers.rms_norm(inputs, torch.ones(in_features, device=DEVICE, dtype=dtype), 1e-5)
            values, scales = launchers.quantize_tokens(x, weight) if is_direct else (x, None)
            shape = (cut.splits, tokens, features)
            out = torch.full(shape, torch.nan, device=DEVICE, dtype=torch.float32 if cut.splits > 1 else dtype)
            launch_quantized_prefetch(values, scales, weight, bias, out, cut, is_gated, is_gelu)
            results.append(out)
        assert all(torch.equal(one, results[0]) for one in results)
        expected = product(x.float(), dense, bias.float())
        assert relative_error(results[0].float().sum(0), expected) < (0.05 if is_direct else TOLERANCE[dtype])
        if scales is not None and not is_gated and not is_gelu:  # what the tensor cores lose while they add up
            exact = reference.scaled_linear(values, scales, weight, bias.float(), torch.float32)
            assert relative_error(results[0].float().sum(0), exact) < 0.004


@pytest.mark.skipif(
    not GLUON_TRIED or not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a Hopper GPU, and a Triton-lang whose Gluon was tried",
)
@pytest.mark.parametrize(
    ("tokens", "blocks"),
    [
        (1, (64, 128, 4, 4, 1, 1, 2)),
        (3, (64, 256, 4, 4, 2, 2, 2)),
        (4, (128, 128, 3, 4, 1, 1, 1)),
        (2, (64, 256, 3, 4, 1, 2, 2)),
        (4, (128, 128, 4, 8, 2, 2, 1)),
        (8, (128, 128, 6, 8, 2, 1, 1)),
        (5, (64, 128, 4, 4, 2, 2, 2)),
        (16, (64, 256, 4, 4, 1, 1, 2)),
        (13, (64, 128, 8, 4, 1, 2, 3)),
    ],
)
@pytest.mark.parametrize(("kind", "group_size"), [("int4", 128), ("int4", 64), ("int4", 1024), ("fp8", 1024)])
def test_pairs_that_a_norm_makes_are_multiplied(
    kind: str, group_size: int, tokens: int, blocks: tuple[int, ...]
) -> None:
    from lightllm_backend.kernels.quantized.quantized_prefetch import launch_quantized_prefetch

    cut = PrefetchBlocks(*blocks)
    for is_gated, dtype in ((False, torch.bfloat16), (False, torch.float16), (True, torch.bfloat16)):
        cut = cut._replace(splits=1 if is_gated else cut.splits)
        features, in_features = 464, 1024
        rows = features * (2 if is_gated else 1)
        weight = into_fragments(random_weight(kind, rows, in_features, group_size, DEVICE))
        bias = torch.randn(rows, device=DEVICE).to(dtype)
        inputs = torch.randn(tokens, in_features, device=DEVICE).to(dtype)
        inputs[0, 5] = 30.0
        product = reference.gated_linear if is_gated else reference.linear
        ones, results = torch.ones(in_features, device=DEVICE, dtype=dtype), []
        for _ in range(20):
            pairs = paired_rms_norm(inputs, ones, 1e-5, None, None, weight)
            shape = (cut.splits, tokens, features)
            is_16_bit = cut.splits == 1 or has_16_bit_parts(dtype)
            out = torch.full(shape, torch.nan, device=DEVICE, dtype=dtype if is_16_bit else torch.float32)
            launch_quantized_prefetch(pairs.values, pairs.scales, weight, bias, out, cut, is_gated, is_paired=True)
            results.append(out)
        assert all(torch.equal(one, results[0]) for one in results)
        result = results[0].float().sum(0)
        expected = product(replace(pairs, dtype=torch.float32), weight, bias.float())
        # Tensor cores lose some of a sum of fp8 while they add it up.
        assert relative_error(result, expected) < (0.004 if kind == "fp8" else TOLERANCE[dtype])
        norm = launchers.rms_norm(inputs, ones, 1e-5)
        assert relative_error(result, product(norm.float(), weight, bias.float())) < TOLERANCE[torch.bfloat16]


@DTYPES
@pytest.mark.parametrize(("tokens", "dim"), [(1, 4096), (256, 14336), (8192, 4096), (7, 1024)])
@pytest.mark.parametrize("with_residual", [False, True])
def test_layer_norm(dtype: torch.dtype, tokens: int, dim: int, with_residual: bool) -> None:
    x, weight, bias = _random(tokens, dim, dtype=dtype), _random(dim, dtype=dtype), _random(dim, dtype=dtype)
    residual = _random(tokens, dim, dtype=dtype) if with_residual else None
    total = x if residual is None else (x.float() + residual.float()).to(dtype)
    out = launchers.layer_norm(x, weight, bias, 1e-5, residual)
    assert residual is None or torch.equal(residual, total)
    expected = reference.layer_norm(total.float(), weight.float(), bias.float(), 1e-5)
    assert relative_error(out, expected) < TOLERANCE[dtype]


@DTYPES
@pytest.mark.parametrize(("tokens", "features"), [(1, 4096), (256, 16384), (4096, 16384), (64, 7168)])
def test_gelu_tanh(dtype: torch.dtype, tokens: int, features: int) -> None:
    x = _random(tokens, features, dtype=dtype)
    assert relative_error(launchers.gelu_tanh(x), reference.gelu_tanh(x.float())) < TOLERANCE[dtype]


@DTYPES
@pytest.mark.parametrize("shape", [LLAMA_7B, LLAMA_70B, SMOLLM2])
@pytest.mark.parametrize("tokens", [1, 256, 5000])
def test_rotary_kv_write(dtype: torch.dtype, shape: tuple[int, int, int], tokens: int) -> None:
    heads, kv_heads, head_dim = shape
    fused = _random(tokens, heads + 2 * kv_heads, head_dim, dtype=dtype)
    q, k, v = fused.split((heads, kv_heads, kv_heads), 1)
    angle = _random(tokens, head_dim // 2) * 100
    slots = torch.randperm(tokens + 10, device=DEVICE)[:tokens].int()
    slots[tokens // 2] = -1
    pools = [torch.full((tokens + 10, kv_heads, head_dim), torch.nan, device=DEVICE, dtype=dtype) for _ in range(2)]
    expected_q, expected_k, expected_v = q.float(), pools[0].float(), pools[1].float()
    reference.rotary_kv_write(expected_q, k.float(), v.float(), angle.cos(), angle.sin(), slots, expected_k, expected_v)
    launchers.rotary_kv_write(q, k, v, angle.cos(), angle.sin(), slots, *pools)
    assert relative_error(q, expected_q) < TOLERANCE[dtype]
    for pool, expected in zip(pools, (expected_k, expected_v), strict=True):
        assert torch.equal(pool.isnan(), expected.isnan())
        assert relative_error(pool.nan_to_num(), expected.nan_to_num()) <= TOLERANCE[dtype]


@DTYPES
@pytest.mark.parametrize("shape", [LLAMA_7B, LLAMA_70B, SMOLLM2])
@pytest.mark.parametrize("tokens", [1, 256, 5000])
@pytest.mark.parametrize("is_rotary", [False, True])
def test_int8_kv_write(dtype: torch.dtype, shape: tuple[int, int, int], tokens: int, is_rotary: bool) -> None:
    heads, kv_heads, head_dim = shape
    fused = _random(tokens, heads + 2 * kv_heads, head_dim, dtype=dtype)
    q, k, v = fused.split((heads, kv_heads, kv_heads), 1)
    angle = _random(tokens, head_dim // 2 if is_rotary else 0) * 100
    slots = torch.randperm(tokens + 10, device=DEVICE)[:tokens].int()
    slots[tokens // 2] = -1
    pools = [torch.full((tokens + 10, kv_heads, head_dim), 99, device=DEVICE, dtype=torch.int8) for _ in range(2)]
    scales = torch.full((tokens + 10, kv_heads, 2), torch.nan, device=DEVICE, dtype=torch.float16)
    expected = [tensor.clone() for tensor in (*pools, scales)]
    kept = fused.clone()[:, heads:].split((kv_heads, kv_heads), 1)
    reference.rotary_kv_write(q.float(), *kept, angle.cos(), angle.sin(), slots, *expected)
    launchers.rotary_kv_write(q, k, v, angle.cos(), angle.sin(), slots, *pools, scales)
    written = slots >= 0
    # A value may be tipped over to its neighbour, see below.
    assert relative_error(k[written], kept[0][written]) < max(TOLERANCE[dtype], 1e-3)
    assert relative_error(v[written], kept[1][written]) < TOLERANCE[dtype]
    assert torch.equal(pools[1], expected[1])
    assert torch.equal(scales[..., 1].nan_to_num(7), expected[2][..., 1].nan_to_num(7))
    for out, wanted in ((pools[0], expected[0]), (scales[..., 0], expected[2][..., 0])):
        # The rotation is rounded once less, which tips a value over to its neighbour now and then.
        difference = (out.nan_to_num(7).float() - wanted.nan_to_num(7).float()).abs()
        assert difference.max() <= 1
        assert (difference > 0).float().mean() < 1e-3


@DTYPES
@pytest.mark.parametrize("shape", [LLAMA_7B, LLAMA_70B, SMOLLM2, (8, 8, 80)])
@pytest.mark.parametrize(
    ("queries", "cached"),
    [([8192], 0), ([1024] * 8, 0), ([1024] * 4, 512), ([1, 2000, 77, 300, 128], 0), ([512, 9, 1, 130], 1000)],
)
def test_prefill_attention(dtype: torch.dtype, shape: tuple[int, int, int], queries: list[int], cached: int) -> None:
    heads, kv_heads, head_dim = shape
    contexts = [length + cached for length in queries]
    pool = make_pool(contexts, kv_heads, head_dim, dtype, DEVICE)
    q = _random(sum(queries), heads + 2 * kv_heads, head_dim, dtype=dtype)[:, :heads]
    rest = (pool.req_to_token, pool.rows, starts_of(queries, DEVICE), pool.context_lengths)
    k, v, cached_only = split_new(pool, queries, len(q), dtype)
    out = launchers.prefill_attention(q, k, v, cached_only.k, cached_only.v, *rest, head_dim**-0.5)
    expected = reference.prefill_attention(q.float(), q, q, *_wide(pool), *rest, head_dim**-0.5)
    assert relative_error(out, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [LLAMA_7B, LLAMA_70B, SMOLLM2])
@pytest.mark.parametrize("cached", [[0], [0, 0, 7], [300]])
@pytest.mark.parametrize(
    "queries", [[3000], [1024] * 4, [1, 5, 64, 65, 130, 127, 128, 129, 300, 192, 40, 1000, 77, 513], [128] * 70]
)
def test_prefill_attention_of_whole_prompts(
    dtype: torch.dtype, shape: tuple[int, int, int], queries: list[int], cached: list[int]
) -> None:
    """Behind decodes and before padding, both full of NaN, twice."""
    heads, kv_heads, head_dim = shape
    starts = np.array([cached[index % len(cached)] for index in range(len(queries))], np.int32)
    pool = make_pool(
        [length + int(start) for length, start in zip(queries, starts, strict=True)], kv_heads, head_dim, dtype, DEVICE
    )
    decodes, padding = 3, 200
    q = torch.full(
        (decodes + sum(queries) + padding, heads + 2 * kv_heads, head_dim), torch.nan, device=DEVICE, dtype=dtype
    )
    q, k, v = q.split((heads, kv_heads, kv_heads), 1)
    live = slice(decodes, decodes + sum(queries))
    q[live] = _random(sum(queries), heads, head_dim, dtype=dtype)
    k[live], v[live], cached_only = split_new(pool, queries, sum(queries), dtype)
    query_starts = starts_of(queries, DEVICE)
    rest = (pool.req_to_token, pool.rows)
    expected = reference.prefill_attention(
        q[live].float(), q, q, *_wide(pool), *rest, query_starts, pool.context_lengths, head_dim**-0.5
    )
    lengths = np.array([1] * decodes + queries, np.int32)
    tiles = order_tiles(np.concatenate([np.full(decodes, 9, np.int32), starts]), lengths, decodes)
    whole = WholePromptTiles(torch.from_numpy(tiles).to(DEVICE), are_all=not starts.any()) if len(tiles) else None
    for _ in range(2):
        out = torch.full_like(q, 7.0).contiguous()
        launchers.prefill_attention(
            q, k, v, cached_only.k, cached_only.v, *rest, query_starts + decodes, pool.context_lengths, head_dim**-0.5,
            whole_prompts=whole, out=out,
        )  # fmt: skip
        assert relative_error(out[live], expected) < TOLERANCE[dtype]
        assert (out[:decodes] == 7).all()
        assert (out[live.stop :] == 7).all()


@DTYPES
@pytest.mark.parametrize("shape", [LLAMA_7B, LLAMA_70B, SMOLLM2, (8, 8, 80)])
@pytest.mark.parametrize("contexts", [[4096], [3, 4096, 0, 700], [4000] * 8, [1 + 3 * i for i in range(256)]])
def test_token_attention(dtype: torch.dtype, shape: tuple[int, int, int], contexts: list[int]) -> None:
    heads, kv_heads, head_dim = shape
    pool = make_pool(contexts, kv_heads, head_dim, dtype, DEVICE)
    new, pool = new_tokens(pool, heads, dtype, head_dim)
    rest = (pool.req_to_token, pool.rows, pool.context_lengths, max(contexts), head_dim**-0.5)
    k, v = (tensor.double().float() for tensor in (pool.k, pool.v))
    expected = reference.token_attention(*new.to(torch.float32), k, v, *rest)
    out = launchers.token_attention(*new, pool.k, pool.v, *rest)
    assert relative_error(out, expected) < TOLERANCE[dtype]
    assert (out[pool.context_lengths == 0] == 0).all()
    written = new.slots[new.slots >= 0].long()
    assert relative_error(pool.k[written], k[written]) < TOLERANCE[dtype]
    assert relative_error(pool.v[written], v[written]) < TOLERANCE[dtype]


@DTYPES
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("shape", [LLAMA_70B, (16, 8, 256), (8, 8, 80)])
def test_heads_are_normed(dtype: torch.dtype, shape: tuple[int, int, int], int8: bool) -> None:
    """Alike by the kernel of decodes and by that of prompts, whose results the references confirm."""
    heads, kv_heads, head_dim = shape
    contexts = [700, 3, 0, 4096, 129]
    pool = make_pool(contexts, kv_heads, head_dim, dtype, DEVICE)
    new, pool = new_tokens(pool.to_int8() if int8 else pool, heads, dtype, head_dim)
    rest = (pool.req_to_token, pool.rows, pool.context_lengths, max(contexts), head_dim**-0.5)
    norm = head_norm(head_dim, dtype, DEVICE)
    others = [pool.copy(), pool.copy()]
    expected = reference.token_attention(*new, others[0].k, others[0].v, *rest, scales=others[0].scales, norm=norm)
    out = launchers.token_attention(*new, pool.k, pool.v, *rest, scales=pool.scales, norm=norm)
    assert relative_error(out, expected) < 2 * TOLERANCE[dtype]
    prompts = new._replace(q=new.q.clone(), k=new.k.clone(), v=new.v.clone())
    launchers.rotary_kv_write(*prompts, others[1].k, others[1].v, others[1].scales, norm=norm)
    written = new.slots[new.slots >= 0].long()
    pools = [one.to(torch.float32) for one in (pool, *others)]
    for one in pools[1:]:
        assert relative_error(pools[0].k[written], one.k[written]) < max(2 * TOLERANCE[dtype], 1e-3)
        assert relative_error(pools[0].v[written], one.v[written]) < max(TOLERANCE[dtype], 1e-3)


@DTYPES
@VARIANTS
@pytest.mark.parametrize(
    ("queries", "cached"), [([5000], 0), ([1024] * 4, 512), ([1, 2000, 77, 300, 128], 0), ([512, 9, 1, 130], 1000)]
)
def test_prefill_attention_variants(
    dtype: torch.dtype, shape: tuple[int, int, int], variant: Variant, queries: list[int], cached: int
) -> None:
    heads, kv_heads, head_dim = shape
    contexts = [length + cached for length in queries]
    pool = make_pool(contexts, kv_heads, head_dim, dtype, DEVICE)
    pool, options, wide_options = _variant(pool, variant, heads)
    q = _random(sum(queries), heads + 2 * kv_heads, head_dim, dtype=dtype)[:, :heads]
    rest = (pool.req_to_token, pool.rows, starts_of(queries, DEVICE), pool.context_lengths)
    k, v, cached_only = split_new(pool, queries, len(q), dtype)
    options["scales"] = cached_only.scales
    out = launchers.prefill_attention(q, k, v, cached_only.k, cached_only.v, *rest, head_dim**-0.5, **options)
    expected = reference.prefill_attention(q.float(), q, q, *_wide(pool), *rest, head_dim**-0.5, **wide_options)
    assert relative_error(out, expected) < TOLERANCE[dtype]


@DTYPES
@VARIANTS
@pytest.mark.parametrize("contexts", [[6000], [3, 4096, 0, 700], [1 + 3 * i for i in range(256)]])
def test_token_attention_variants(
    dtype: torch.dtype, shape: tuple[int, int, int], variant: Variant, contexts: list[int]
) -> None:
    heads, kv_heads, head_dim = shape
    pool = make_pool(contexts, kv_heads, head_dim, dtype, DEVICE)
    new, pool = new_tokens(pool.to_int8() if variant.int8 else pool, heads, dtype, head_dim)
    rest = (pool.req_to_token, pool.rows, pool.context_lengths, max(contexts), head_dim**-0.5)
    options = variant.options(pool, heads)
    wide = pool.copy() if variant.int8 else pool.to(torch.float64).to(torch.float32)
    wide_options = options | {"scales": wide.scales}
    expected = reference.token_attention(*new.to(torch.float32), wide.k, wide.v, *rest, **wide_options)
    out = launchers.token_attention(*new, pool.k, pool.v, *rest, **options)
    assert relative_error(out, expected) < TOLERANCE[dtype]
    assert (out[pool.context_lengths == 0] == 0).all()
    written = new.slots[new.slots >= 0].long()
    wide = wide.to(torch.float32)
    assert relative_error(pool.to(torch.float32).k[written], wide.k[written]) < max(TOLERANCE[dtype], 1e-3)


@DTYPES
@pytest.mark.parametrize("window", [0, 1000])
@pytest.mark.parametrize("splits", [1, 2, 37])
def test_merge_splits(dtype: torch.dtype, splits: int, window: int) -> None:
    partial, log_sums = _random(16, 32, splits, 128), _random(16, 32, splits) * 5
    contexts = torch.randint(0, 3000, (16,), device=DEVICE, dtype=torch.int32)
    parts = (contexts, window, 32)
    out = launchers.merge_splits(partial, log_sums, *parts, partial.new_zeros(16, 32, 128, dtype=dtype))
    expected = reference.merge_splits(partial, log_sums, *parts, partial.new_zeros(16, 32, 128))
    assert relative_error(out, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize(("sequences", "vocab_size"), [(1, 32000), (256, 32000), (33, 49152), (4, 250880)])
def test_penalties(sequences: int, vocab_size: int) -> None:
    logits = _random(sequences, vocab_size) * 5
    tokens = torch.randint(0, vocab_size, (sequences + 5, 3072), device=DEVICE, dtype=torch.int32)
    tokens[:, 1000:] = tokens[:, :1] + 1  # many of one token, so that counts are high
    rows = torch.randperm(sequences + 5, device=DEVICE)[:sequences].int()
    prompt_lengths = torch.randint(1, 1500, (sequences,), device=DEVICE, dtype=torch.int32)
    lengths = prompt_lengths + torch.randint(0, 1500, (sequences,), device=DEVICE, dtype=torch.int32)
    tokens.clamp_(max=vocab_size - 1)
    presence, frequency = _random(sequences), _random(sequences)
    repetition = torch.rand(sequences, device=DEVICE) + 0.5
    for values, neutral in ((presence, 0), (frequency, 0), (repetition, 1)):
        values[::3] = neutral
    min_tokens = torch.randint(0, 1500, (sequences,), device=DEVICE, dtype=torch.int32)
    ending_ids = torch.tensor([[2, vocab_size - 1], [-1, -1]], dtype=torch.int32, device=DEVICE)
    ending_ids = ending_ids.repeat(sequences, 1)[:sequences]
    counted = (tokens, rows, prompt_lengths, lengths)
    assert torch.equal(launchers.count_tokens(*counted, vocab_size), reference.count_tokens(*counted, vocab_size))
    expected, before = logits.clone(), logits.clone()
    arguments = (*counted, presence, frequency, repetition, min_tokens, ending_ids)
    launchers.apply_penalties(logits, *arguments)
    reference.apply_penalties(expected, *arguments)
    assert torch.allclose(logits, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits[::3, 3 : vocab_size - 1], before[::3, 3 : vocab_size - 1])


@pytest.mark.parametrize(("sequences", "vocab_size"), [(1, 32000), (256, 32000), (256, 49152), (40, 250880)])
def test_sample(sequences: int, vocab_size: int) -> None:
    logits = _random(sequences, vocab_size) * 4
    choice = torch.arange(sequences, device=DEVICE)
    temperature = torch.tensor([0.0, 0.3, 1.0, 0.7], device=DEVICE)[choice % 4]
    top_k = torch.tensor([-1, 50, 1, 0, 1000], device=DEVICE, dtype=torch.int32)[choice % 5]
    top_p = torch.tensor([1.0, 0.9, 0.3], device=DEVICE)[choice % 3]
    min_p = torch.tensor([0.0, 0.05], device=DEVICE)[choice % 2]
    seed = torch.randint(-(2**63), 2**63 - 1, (sequences,), device=DEVICE)
    position = torch.randint(0, 4096, (sequences,), device=DEVICE, dtype=torch.int32)
    tables = [torch.full((sequences,), -1, device=DEVICE, dtype=torch.int32) for _ in range(2)]
    arguments = (logits, temperature, top_k, top_p, min_p, seed, position, choice)
    tokens, expected = launchers.sample(*arguments, tables[0]), reference.sample(*arguments, tables[1])
    assert torch.equal(tokens, tables[0])
    same = tokens == expected
    assert same[temperature == 0].all()
    # Sums in another order shift the bounds between tokens by some 1e-6, and now and then a draw falls in between.
    assert same.float().mean() >= 0.98
    again = launchers.sample(*arguments, tables[0])
    assert torch.equal(tokens, again)


@pytest.mark.parametrize(("top_k", "top_p"), [(-1, 1.0), (6, 1.0), (-1, 0.8)])
def test_sample_has_the_exact_distribution(top_k: int, top_p: float) -> None:
    draws = 100_000
    logits = torch.randn(1, 12) * 1.5
    exact = logits[0].double().softmax(0)
    order = exact.argsort(descending=True)
    kept = order[:top_k] if top_k > 0 else order[exact[order].cumsum(0) - exact[order] < top_p]
    exact = torch.zeros_like(exact).index_copy(0, kept, exact[kept] / exact[kept].sum())
    tokens = launchers.sample(
        logits.to(DEVICE).repeat(draws, 1),
        torch.ones(draws, device=DEVICE),
        torch.full((draws,), top_k, device=DEVICE, dtype=torch.int32),
        torch.full((draws,), top_p, device=DEVICE),
        torch.zeros(draws, device=DEVICE),
        torch.full((draws,), 7, device=DEVICE, dtype=torch.int64),
        torch.arange(draws, device=DEVICE, dtype=torch.int32),
        torch.arange(draws, device=DEVICE),
        torch.empty(draws, device=DEVICE, dtype=torch.int32),
    )
    observed = torch.bincount(tokens.cpu().long(), minlength=12)
    assert observed.sum() == observed[kept].sum()
    statistic = float(((observed - draws * exact)[kept].square() / (draws * exact[kept])).sum())
    freedom = len(kept) - 1
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5


def test_a_decode_step_can_be_captured_in_a_graph() -> None:
    """No launcher waits for the GPU or allocates by its data; a replay sees the new lengths and logits."""
    pool = make_pool([700, 40, 1, 300], 8, 128, torch.bfloat16, DEVICE)
    q, k = _random(4, 64, 128, dtype=torch.bfloat16), _random(4, 8, 128, dtype=torch.bfloat16)
    cos = _random(4, 64)
    slots = torch.full((4,), -1, device=DEVICE, dtype=torch.int32)
    logits, floats = _random(4, 32000), torch.full((4,), 0.8, device=DEVICE)
    integers = torch.full((4,), 7, device=DEVICE, dtype=torch.int32)
    places = torch.arange(4, device=DEVICE)

    def step() -> tuple[Tensor, Tensor]:
        out = launchers.token_attention(
            q, k, k, cos, cos, slots, pool.k, pool.v, pool.req_to_token, pool.rows, pool.context_lengths, 700, 128**-0.5
        )
        launchers.apply_penalties(
            logits, pool.req_to_token, pool.rows, integers, integers, *[floats] * 3, integers, integers[:, None]
        )
        target = places, torch.empty_like(integers)
        return out, launchers.sample(logits, floats, integers, floats, floats, integers.long(), integers, *target)

    # The captured addresses are filled with NaN by an extra kernel otherwise.
    torch.use_deterministic_algorithms(False)
    original_q, original_logits = q.clone(), logits.clone()
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for lengths in ([700, 40, 1, 300], [3, 0, 1, 299]):
        pool.context_lengths.copy_(torch.tensor(lengths))
        q.copy_(original_q)
        logits.copy_(original_logits)
        expected = [result.clone() for result in step()]
        q.copy_(original_q)
        logits.copy_(original_logits)
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(result, other) for result, other in zip(captured, expected, strict=True))
