# SPDX-License-Identifier: Apache-2.0
"""The compiled kernels of a CPU against their references, which they call for what they are not compiled for."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lightllm_backend.kernels import compiled, reference
from lightllm_backend.kernels.compiled import attention, products
from lightllm_backend.kernels.quantized.grid_weight import has_kernel, with_grid
from tests.kernels.kernel_harness import TOLERANCE, VARIANTS, Variant, head_norm, make_pool, new_tokens, relative_error
from tests.kernels.test_grid_weight import on_grid

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]

needs_products = pytest.mark.skipif(not has_kernel(CPU), reason="this CPU has no kernel")


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without references to fall back on, and with more threads than the machine may have."""
    module = ModuleType("no_reference")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    for name in ("rows", "attention", "products"):
        monkeypatch.setattr(importlib.import_module(f"lightllm_backend.kernels.compiled.{name}"), "reference", module)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_parts", [False, True])
@pytest.mark.parametrize("post_normed", ["not", "by the model's dtype", "by float32"])
def test_rms_norm(dtype, in_parts, post_normed, alone) -> None:
    weight_dtype = torch.float32 if post_normed == "by float32" else dtype
    x, residual, weight = torch.randn(3, 70).to(dtype), torch.randn(3, 70).to(dtype), torch.randn(70).to(weight_dtype)
    post = None if post_normed == "not" else torch.randn(70).to(weight_dtype)
    sums = residual.clone()
    expected = reference.rms_norm(x, weight, 1e-3, sums, post)
    out = compiled.rms_norm(x.unsqueeze(0) if in_parts else x, weight, 1e-3, residual, post)
    assert out.dtype == dtype
    assert relative_error(out, expected) < TOLERANCE[dtype]
    if post is None:
        assert torch.equal(residual, sums)
    assert relative_error(residual, sums) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_gelu", [False, True])
def test_silu_and_mul(dtype, is_gelu, alone) -> None:
    gate_up = (torch.randn(3, 140) * 4).to(dtype)
    gate_up[0, :6] = torch.tensor([-200.0, 200.0, 0.0, -0.0, -88.0, 88.0])
    out, expected = compiled.silu_and_mul(gate_up, is_gelu), reference.silu_and_mul(gate_up, is_gelu)
    assert out.dtype == dtype
    assert relative_error(out, expected) < TOLERANCE[dtype]
    torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("contexts", [[1], [70, 0, 64, 130, 2]])
@pytest.mark.parametrize(("shape", "rotary_dim"), [((4, 2, 64), 64), ((3, 1, 20), 8), ((2, 2, 16), 0)])
@pytest.mark.parametrize("normed", ["not", "by the model's dtype", "by float32"])
def test_token_attention(dtype, contexts, shape, rotary_dim, normed, alone, monkeypatch) -> None:
    heads, kv_heads, head_dim = shape
    new, pool = new_tokens(make_pool(contexts, kv_heads, head_dim, dtype, CPU), heads, dtype, rotary_dim)
    other = pool.copy()
    rest = (pool.req_to_token, pool.rows, pool.context_lengths, max(contexts), head_dim**-0.5)
    before = [tensor.clone() for tensor in new]
    monkeypatch.setattr(attention, "_MANY_CONTEXT_TOKENS", 100)
    norm = None if normed == "not" else head_norm(head_dim, torch.float32 if normed == "by float32" else dtype, CPU)
    out = compiled.token_attention(*new, pool.k, pool.v, *rest, norm=norm)
    expected = reference.token_attention(*new, other.k, other.v, *rest, norm=norm)
    assert out.dtype == dtype
    assert relative_error(out, expected) < TOLERANCE[dtype]
    for written, wanted in ((pool.k, other.k), (pool.v, other.v)):
        # NaN where nobody has written: the same slots.
        torch.testing.assert_close(written, wanted, rtol=1e-2, atol=1e-6, equal_nan=True)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(new, before, strict=True))


@needs_products
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("has_bias", [False, True])
def test_products_with_grids(dtype, bits, has_bias, alone, monkeypatch) -> None:
    weight = with_grid(on_grid(bits, 192).to(dtype))
    bias = torch.randn(192).to(dtype) if has_bias else None
    for tokens in (1, 2, 4, 7):
        x = (torch.randn(tokens, 96) * 3).to(dtype)
        assert relative_error(compiled.linear(x, weight, bias), reference.linear(x, weight, bias)) < TOLERANCE[dtype]
        activated = compiled.linear(x, weight, bias, is_gelu=True)
        assert relative_error(activated, reference.linear(x, weight, bias, is_gelu=True)) < TOLERANCE[dtype]
        gated = compiled.gated_linear(x, weight, bias)
        assert relative_error(gated, reference.gated_linear(x, weight, bias)) < TOLERANCE[dtype]
        monkeypatch.setattr(products, "_MANY_PRODUCTS", 0)
        assert torch.equal(compiled.gated_linear(x, weight, bias), gated), "threads change a result"


@needs_products
def test_products_with_avx2_alone() -> None:
    """It adds pairs of products in 16 bits, which the largest values must not overflow."""
    code = """
import torch
from lightllm_backend.kernels import compiled, reference
from lightllm_backend.kernels.quantized.grid_weight import with_grid
for bits in (4, 8):
    numbers = torch.arange(64 * 64).view(64, 64) % 2**bits * (torch.arange(64) % 2)
    numbers[:, 0::8], numbers[:, 1::8] = 2**bits - 1, 1 if bits == 8 else 0
    weight = with_grid(numbers.float() - (128 if bits == 8 else 3))
    assert weight.bits == bits
    for x in (torch.randn(5, 64), torch.full((1, 64), -1.0)):
        torch.testing.assert_close(compiled.linear(x, weight), reference.linear(x, weight), rtol=1e-5, atol=1e-3)
"""
    cpu = {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": "+avx2,+f16c,+fma"}
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, **cpu, "PYTHONPATH": str(root)})


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_no_number_stays_none(dtype) -> None:
    """A broken model must not look sound."""
    x, residual = torch.full((1, 70), torch.nan).to(dtype), torch.randn(1, 70).to(dtype)
    assert compiled.rms_norm(x, torch.ones(70).to(dtype), 1e-5, residual).isnan().all()
    assert compiled.silu_and_mul(torch.full((1, 140), torch.nan).to(dtype)).isnan().all()
    if has_kernel(CPU):
        one = torch.ones(1, 96).to(dtype)
        one[0, 50] = torch.nan
        assert compiled.linear(one, with_grid(on_grid(4).to(dtype))).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spoiled", ["q", "k", "v"])
@pytest.mark.parametrize("variant", [Variant(), *VARIANTS])
@pytest.mark.parametrize("kernels", [compiled, reference])
def test_attention_to_what_is_no_number_is_none(dtype, spoiled, variant, kernels) -> None:
    """torch makes 0 of it where a sequence has fewer keys than its vectors have numbers, unless there is a mask."""
    contexts = [1, 2, 3, 7, 8, 9, 15, 16, 17, 40]
    for several in (contexts, *([context] for context in contexts)):
        new, pool = new_tokens(make_pool(several, 2, 64, dtype, CPU), 4, dtype, 64)
        pool = pool.to_int8() if variant.int8 else pool
        getattr(new, spoiled).fill_(torch.nan)
        rest = (pool.req_to_token, pool.rows, pool.context_lengths, max(several), 0.125)
        out = kernels.token_attention(*new, pool.k, pool.v, *rest, **variant.options(pool, 4))
        assert out.isnan().all(), several


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", [one for one in VARIANTS if not (one.alibi or one.int8)])
def test_token_attention_with_windows_and_soft_caps(variant, dtype, alone) -> None:
    new, pool = new_tokens(make_pool([5, 0, 33, 130], 2, 64, dtype, CPU), 4, dtype, 64)
    other, rest = pool.copy(), (pool.req_to_token, pool.rows, pool.context_lengths, 130, 0.3)
    out = compiled.token_attention(*new, pool.k, pool.v, *rest, **variant.options(pool, 4))
    expected = reference.token_attention(*new, other.k, other.v, *rest, **variant.options(pool, 4))
    assert relative_error(out, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("variant", [one for one in VARIANTS if one.alibi or one.int8])
def test_the_reference_computes_what_is_not_compiled(variant) -> None:
    pool = make_pool([5, 33], 2, 64, torch.float32, CPU)
    new, pool = new_tokens(pool.to_int8() if variant.int8 else pool, 4, torch.float32, 64)
    other = pool.copy()
    rest = (pool.req_to_token, pool.rows, pool.context_lengths, 33, 0.125)
    options = variant.options(pool, 4)
    out = compiled.token_attention(*new, pool.k, pool.v, *rest, **options)
    expected = reference.token_attention(*new, other.k, other.v, *rest, **options | {"scales": other.scales})
    assert torch.equal(out, expected)


def test_many_numbers_are_the_references() -> None:
    x, residual, weight = torch.randn(300, 160), torch.randn(300, 160), torch.randn(160)
    copy = residual.clone()
    assert torch.equal(compiled.rms_norm(x, weight, 1e-5, residual), reference.rms_norm(x, weight, 1e-5, copy))
    assert torch.equal(compiled.silu_and_mul(x), reference.silu_and_mul(x))
