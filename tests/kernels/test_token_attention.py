# SPDX-License-Identifier: Apache-2.0
"""token_attention: the reference against naive softmax, the kernel against it, and how contexts are split."""

import pytest
import torch

from lightllm_backend.kernels import launchers, reference, token_attention, token_attention_int8
from tests.kernels.kernel_harness import (
    TOLERANCE,
    VARIANTS,
    Variant,
    make_pool,
    naive_attention,
    relative_error,
)

CONTEXTS = [[1], [5, 1, 33], [70, 0, 64, 130, 2], [0]]
SHAPES = [(1, 1, 16), (4, 2, 64), (3, 1, 80), (2, 2, 96), (8, 1, 128), (2, 1, 20), (5, 5, 24)]


def _step(contexts, shape, dtype, device):
    heads, kv_heads, head_dim = shape
    pool = make_pool(contexts, kv_heads, head_dim, dtype, device)
    fused = torch.randn(len(contexts), (heads + 2) * head_dim, device=device).to(dtype)
    q = fused[:, : heads * head_dim].unflatten(1, (heads, head_dim))
    return q, pool, (pool.req_to_token, pool.rows, pool.context_lengths, max([*contexts, 1]), head_dim**-0.5)


def _naive(q, pool, scale, **options):
    lengths = [min(1, int(context)) for context in pool.context_lengths]
    expected = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    live = pool.context_lengths > 0
    expected[live] = naive_attention(q[live], pool, lengths, scale, **options)
    return expected


@pytest.mark.parametrize("contexts", CONTEXTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_reference_is_naive_attention(contexts, shape):
    q, pool, rest = _step(contexts, shape, torch.float32, torch.device("cpu"))
    out = reference.token_attention(q, pool.k, pool.v, *rest)
    assert relative_error(out, _naive(q, pool, rest[-1])) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(
    ("contexts", "shape"),
    [(CONTEXTS[2], shape) for shape in SHAPES] + [(CONTEXTS[1], SHAPES[1]), (CONTEXTS[3], SHAPES[0])],
)
def test_kernel_matches_the_reference(contexts, shape, splits, dtype, device, monkeypatch):
    # With three splits, those of the short contexts stay empty.
    for module in (token_attention, token_attention_int8):
        monkeypatch.setattr(module, "split_count", lambda *_: splits)
    q, pool, rest = _step(contexts, shape, dtype, device)
    out = launchers.token_attention(q, pool.k, pool.v, *rest)
    wide = pool.to(torch.float32)
    expected = reference.token_attention(q.float(), wide.k, wide.v, *rest)
    assert out.dtype == dtype
    assert relative_error(out, expected) < TOLERANCE[dtype]
    assert (out[pool.context_lengths == 0] == 0).all()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[2], SHAPES[6]])
def test_reference_variants_are_naive_attention(variant, shape):
    q, pool, rest = _step(CONTEXTS[2], shape, torch.float32, torch.device("cpu"))
    pool = pool.to_int8() if variant.int8 else pool
    options = variant.options(pool, shape[0])
    out = reference.token_attention(q, pool.k, pool.v, *rest, **options)
    assert relative_error(out, _naive(q, pool, rest[-1], **options)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[4], SHAPES[6]])
def test_kernel_variants_match_the_reference(variant, shape, splits, dtype, device, monkeypatch):
    for module in (token_attention, token_attention_int8):
        monkeypatch.setattr(module, "split_count", lambda *_: splits)
    q, pool, rest = _step(CONTEXTS[2], shape, dtype, device)
    pool = pool.to_int8() if variant.int8 else pool
    options = variant.options(pool, shape[0])
    out = launchers.token_attention(q, pool.k, pool.v, *rest, **options)
    wide = pool.to(torch.float32)
    expected = reference.token_attention(
        q.float(), wide.k, wide.v, *rest, **options | {"k_scales": None, "v_scales": None}
    )
    assert out.dtype == dtype
    assert relative_error(out, expected) < TOLERANCE[dtype]
    assert (out[pool.context_lengths == 0] == 0).all()


@pytest.mark.parametrize("implementation", [reference, launchers])
def test_nothing_before_the_window_is_read(implementation, device):
    q, pool, rest = _step([90, 3], (4, 2, 16), torch.float32, device)
    expected = _naive(q, pool, rest[-1], window=11)
    unseen = pool.req_to_token[int(pool.rows[0]), : 90 - 11].long()
    pool.k[unseen], pool.v[unseen] = torch.nan, torch.nan
    out = implementation.token_attention(q, pool.k, pool.v, *rest, window=11)
    assert relative_error(out, expected) < 1e-5


@pytest.mark.parametrize("implementation", [reference, launchers])
@pytest.mark.parametrize("shape", [(2, 2, 16), (4, 1, 16)])
def test_small_int8_values_keep_their_precision_in_float16(implementation, shape, device):
    q, pool, rest = _step([300], shape, torch.float16, device)
    pool = pool.to_int8()
    pool.v_scales.fill_(2.0**-14)
    options = Variant(int8=True).options(pool, shape[0])
    out = implementation.token_attention(q, pool.k, pool.v, *rest, **options)
    assert relative_error(out, _naive(q, pool, rest[-1], **options)) < 2e-3


def test_a_longer_bound_changes_nothing(device):
    q, pool, rest = _step([9, 3], (2, 1, 16), torch.float32, device)
    table, rows, lengths, _, scale = rest
    out = launchers.token_attention(q, pool.k, pool.v, *rest)
    loose = launchers.token_attention(q, pool.k, pool.v, table, rows, lengths, table.shape[1], scale)
    assert torch.equal(out, loose)


@pytest.mark.parametrize("implementation", [reference, launchers])
def test_large_scores_do_not_overflow(implementation, device):
    q, pool, rest = _step([20], (2, 1, 16), torch.float32, device)
    q = q * 300
    out = implementation.token_attention(q, pool.k, pool.v, *rest)
    assert relative_error(out, _naive(q, pool, rest[-1])) < 1e-4


@pytest.mark.parametrize("implementation", [reference, launchers])
def test_no_sequences(implementation, device):
    q, pool, rest = _step([4], (2, 1, 16), torch.float32, device)
    table, rows, lengths, longest, scale = rest
    out = implementation.token_attention(q[:0], pool.k, pool.v, table, rows[:0], lengths[:0], longest, scale)
    assert out.shape == (0, 2, 16)
