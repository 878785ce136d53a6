# SPDX-License-Identifier: Apache-2.0
"""token_attention: the reference against naive softmax, the kernel against it, and how contexts are split."""

import pytest
import torch

from lightllm_backend.kernels import launchers, reference
from lightllm_backend.kernels.attention import token_attention, token_attention_int8
from tests.kernels.kernel_harness import (
    TOLERANCE,
    VARIANTS,
    combinations,
    head_norm,
    make_pool,
    naive_attention,
    new_tokens,
    relative_error,
)

CONTEXTS = [[1], [5, 1, 33], [64, 0, 130, 2], [0]]
SHAPES = [(1, 1, 16), (4, 2, 64), (3, 1, 80), (2, 2, 96), (8, 1, 128), (2, 1, 20), (3, 3, 24)]


def _step(contexts, shape, dtype, device, int8=False, rotary_dim=0):
    """The new tokens, the pool without them, and the rest of the arguments."""
    heads, kv_heads, head_dim = shape
    pool = make_pool(contexts, kv_heads, head_dim, dtype, device)
    new, pool = new_tokens(pool.to_int8() if int8 else pool, heads, dtype, rotary_dim)
    return new, pool, (pool.req_to_token, pool.rows, pool.context_lengths, max([*contexts, 1]), head_dim**-0.5)


def _naive(new, pool, scale, **options):
    """Over a pool to which the new tokens have been written; `new` is not rotated."""
    lengths = [min(1, int(context)) for context in pool.context_lengths]
    expected = torch.zeros(new.q.shape, dtype=torch.float64, device=new.q.device)
    live = pool.context_lengths > 0
    expected[live] = naive_attention(new.q[live], pool, lengths, scale, **options)
    return expected


def _check_kernel(new, pool, rest, options, tolerance, norm=None):
    """Its output, and what it writes, beside the reference's in float32."""
    wide = pool.copy() if pool.scales is not None else pool.to(torch.float64).to(torch.float32)
    wide_norm = norm and norm._replace(q=norm.q.float(), k=norm.k.float())
    out = launchers.token_attention(*new, pool.k, pool.v, *rest, **options | {"scales": pool.scales}, norm=norm)
    expected = reference.token_attention(
        *new.to(torch.float32), wide.k, wide.v, *rest, **options | {"scales": wide.scales}, norm=wide_norm
    )
    assert out.dtype == new.q.dtype
    assert relative_error(out, expected) < tolerance
    assert (out[pool.context_lengths == 0] == 0).all()
    slots = new.slots[new.slots >= 0].long()
    for written, wanted in zip(pool.to(torch.float32)[:2], wide.to(torch.float32)[:2], strict=True):
        # An int8 may be tipped over to its neighbour by rounding.
        assert relative_error(written[slots], wanted[slots]) < (1e-2 if pool.scales is not None else tolerance)
    others = torch.ones(len(pool.k), dtype=torch.bool, device=pool.k.device)
    others[slots] = False
    assert torch.equal(pool.k[others].nan_to_num(), wide.k[others].to(pool.k.dtype).nan_to_num())


def test_combinations_have_all_of_the_axes_but_the_first():
    chosen = combinations("abcdefg", "de", "fgh", "ij", every=7)
    assert len(chosen) in (12, 84)
    assert len({values[1:] for values in chosen}) == 12
    assert {values[0] for values in chosen} == set("abcdefg")


@pytest.mark.parametrize("contexts", CONTEXTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_reference_is_naive_attention(contexts, shape):
    new, pool, rest = _step(contexts, shape, torch.float32, torch.device("cpu"))
    out = reference.token_attention(*new, pool.k, pool.v, *rest)
    assert relative_error(out, _naive(new, pool, rest[-1])) < 1e-6


def test_reference_rotates_and_writes():
    new, pool, rest = _step([5, 0, 9], (4, 2, 16), torch.float32, torch.device("cpu"), rotary_dim=8)
    before, rotated = new.k.clone(), new._replace(q=new.q.clone(), k=new.k.clone(), v=new.v.clone())
    out = reference.token_attention(*new, pool.k, pool.v, *rest)
    assert torch.equal(new.k, before)
    reference.rotary_kv_write(*rotated, *pool.copy()[:2])
    assert torch.equal(pool.k[new.slots[2]], rotated.k[2])
    assert torch.equal(pool.v[new.slots[0]], rotated.v[0])
    assert relative_error(out, _naive(rotated, pool, rest[-1])) < 1e-6


@pytest.mark.parametrize(
    ("sequences", "splits", "rotary", "dtype"),
    combinations(
        [(CONTEXTS[2][:3], shape) for shape in SHAPES] + [(CONTEXTS[1], SHAPES[1]), (CONTEXTS[3], SHAPES[0])],
        [1, 3],
        [0, 0.5, 1],
        [torch.float32, torch.float16],
        every=5,
    ),
)
def test_kernel_matches_the_reference(sequences, splits, rotary, dtype, device, monkeypatch):
    contexts, shape = sequences
    # With three splits, those of the short contexts stay empty.
    for module in (token_attention, token_attention_int8):
        monkeypatch.setattr(module, "split_count", lambda *_: splits)
    step = _step(contexts, shape, dtype, device, rotary_dim=int(rotary * shape[2]) // 2 * 2)
    _check_kernel(*step, {}, TOLERANCE[dtype])


def test_reference_norms_heads_as_rotary_kv_write_does():
    new, pool, rest = _step([5, 0, 9], (4, 2, 16), torch.float32, torch.device("cpu"), rotary_dim=8)
    normed = new._replace(q=new.q.clone(), k=new.k.clone(), v=new.v.clone())
    norm = head_norm(16, torch.float32, new.q.device)
    out = reference.token_attention(*new, pool.k, pool.v, *rest, norm=norm)
    reference.rotary_kv_write(*normed, *pool.copy()[:2], norm=norm)
    assert torch.equal(pool.k[new.slots[2]], normed.k[2])
    assert relative_error(out, _naive(normed, pool, rest[-1])) < 1e-6


@pytest.mark.parametrize(
    ("shape", "dtype", "int8"),
    combinations([SHAPES[1], SHAPES[2], SHAPES[6]], [torch.float32, torch.float16], [False, True], every=3),
)
def test_kernel_norms_heads(shape, dtype, int8, device):
    norm = head_norm(shape[2], dtype, device)
    step = _step([70, 0, 2], shape, dtype, device, int8, rotary_dim=shape[2] // 4 * 2)
    _check_kernel(*step, {}, 2 * TOLERANCE[dtype], norm)  # a normed query is rounded once more


@pytest.mark.parametrize("int8", [False, True])
def test_kernel_norms_heads_that_it_does_not_rotate(int8, device):
    norm = head_norm(64, torch.float32, device)
    _check_kernel(*_step([70, 0, 2], (4, 2, 64), torch.float32, device, int8), {}, TOLERANCE[torch.float32], norm)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[2], SHAPES[6]])
def test_reference_variants_are_naive_attention(variant, shape):
    new, pool, rest = _step(CONTEXTS[2], shape, torch.float32, torch.device("cpu"), variant.int8)
    options = variant.options(pool, shape[0])
    out = reference.token_attention(*new, pool.k, pool.v, *rest, **options)
    assert relative_error(out, _naive(new, pool, rest[-1], **options)) < 1e-6


@pytest.mark.parametrize(
    ("variant", "shape", "splits", "dtype"),
    combinations(VARIANTS, [SHAPES[1], SHAPES[4], SHAPES[6]], [1, 3], [torch.float32, torch.float16], every=7),
)
def test_kernel_variants_match_the_reference(variant, shape, splits, dtype, device, monkeypatch):
    for module in (token_attention, token_attention_int8):
        monkeypatch.setattr(module, "split_count", lambda *_: splits)
    step = _step([70, 0, 2], shape, dtype, device, variant.int8, rotary_dim=8)
    _check_kernel(*step, variant.options(step[1], shape[0]), TOLERANCE[dtype])


@pytest.mark.parametrize("implementation", [reference, launchers])
def test_nothing_before_the_window_is_read(implementation, device):
    new, pool, rest = _step([90, 3], (4, 2, 16), torch.float32, device)
    filled = pool.copy()
    reference.token_attention(*new, filled.k, filled.v, *rest)
    expected = _naive(new, filled, rest[-1], window=11)
    unseen = pool.req_to_token[int(pool.rows[0]), : 90 - 11].long()
    pool.k[unseen], pool.v[unseen] = torch.nan, torch.nan
    out = implementation.token_attention(*new, pool.k, pool.v, *rest, window=11)
    assert relative_error(out, expected) < 1e-5


@pytest.mark.parametrize("implementation", [reference, launchers])
@pytest.mark.parametrize("shape", [(2, 2, 16), (4, 1, 16)])
def test_small_int8_values_keep_their_precision_in_float16(implementation, shape, device):
    new, pool, rest = _step([130], shape, torch.float16, device, int8=True)
    pool.scales[:, :, 1] = 2.0**-14
    new.v.mul_(2.0**-8)
    out = implementation.token_attention(*new, pool.k, pool.v, *rest, scales=pool.scales)
    assert relative_error(out, _naive(new, pool, rest[-1])) < 2e-3


def test_a_longer_bound_changes_nothing(device):
    new, pool, rest = _step([9, 3], (2, 1, 16), torch.float32, device)
    table, rows, lengths, _, scale = rest
    out = launchers.token_attention(*new, pool.k, pool.v, *rest)
    loose = launchers.token_attention(*new, pool.k, pool.v, table, rows, lengths, table.shape[1], scale)
    assert torch.equal(out, loose)


@pytest.mark.parametrize("implementation", [reference, launchers])
def test_large_scores_do_not_overflow(implementation, device):
    new, pool, rest = _step([20], (2, 1, 16), torch.float32, device)
    new.q.mul_(300)
    out = implementation.token_attention(*new, pool.k, pool.v, *rest)
    assert relative_error(out, _naive(new, pool, rest[-1])) < 1e-4


@pytest.mark.parametrize("implementation", [reference, launchers])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("contexts", [[5, 6], [0, 3, 200]])  # not split, and split
def test_the_result_goes_where_it_is_wanted(implementation, contexts, int8, device):
    new, pool, rest = _step(contexts, (2, 1, 16), torch.float32, device, int8=int8)
    options = {"scales": pool.scales}
    expected = implementation.token_attention(*new, pool.k, pool.v, *rest, **options)
    wide = new.q.new_full((len(contexts) + 1, 2, 16), 7.0)
    out = implementation.token_attention(*new, pool.k, pool.v, *rest, **options, out=wide[:-1])
    assert out.data_ptr() == wide.data_ptr()
    live = pool.context_lengths > 0
    assert torch.equal(wide[:-1][live], expected[live])
    assert (wide[-1] == 7).all()
    assert (wide[:-1][~live] == 7).all(), "a padding row is somebody else's"


@pytest.mark.parametrize("implementation", [reference, launchers])
@pytest.mark.parametrize("int8", [False, True])
def test_padding_with_a_slot_writes_nothing(implementation, int8, device):
    """It is a token of a prompt, which prefills."""
    new, pool, rest = _step([5, 0], (2, 1, 16), torch.float32, device, int8=int8)
    free = sorted(set(range(len(pool.k))) - set(pool.req_to_token.flatten().tolist()) - {int(new.slots[0])})[0]
    new.slots[1] = free
    before = pool.copy()
    implementation.token_attention(*new, pool.k, pool.v, *rest, scales=pool.scales)
    assert torch.equal(pool.k[free].nan_to_num(), before.k[free].nan_to_num())
    assert torch.equal(pool.v[free].nan_to_num(), before.v[free].nan_to_num())


@pytest.mark.parametrize("implementation", [reference, launchers])
def test_no_sequences(implementation, device):
    new, pool, rest = _step([4], (2, 1, 16), torch.float32, device)
    table, rows, lengths, longest, scale = rest
    none = [tensor[:0] for tensor in new]
    out = implementation.token_attention(*none, pool.k, pool.v, table, rows[:0], lengths[:0], longest, scale)
    assert out.shape == (0, 2, 16)
