# SPDX-License-Identifier: Apache-2.0
"""prefill_attention: the reference against naive softmax, the kernel against the reference."""

import pytest
import torch

from lightllm_backend.kernels import hardware, launchers, reference
from lightllm_backend.kernels.attention import prefill_attention
from lightllm_backend.kernels.attention import reference as attention
from tests.kernels.kernel_harness import (
    TOLERANCE,
    VARIANTS,
    Variant,
    combinations,
    make_pool,
    naive_attention,
    relative_error,
    split_new,
    starts_of,
)

# Query lengths and context lengths.
STEPS = [
    ([1], [1]),
    ([7], [7]),
    ([5], [40]),
    ([1, 33, 4], [1, 33, 4]),
    ([3, 40, 1, 17, 2], [70, 40, 65, 18, 3]),
]
# Heads, KV heads and head_dim.
SHAPES = [(1, 1, 16), (4, 2, 64), (3, 1, 80), (2, 2, 96), (8, 1, 128), (2, 1, 20)]


def _step(queries, contexts, shape, dtype, device):
    heads, kv_heads, head_dim = shape
    pool = make_pool(contexts, kv_heads, head_dim, dtype, device)
    # A view into a fused tensor, with two tokens of padding at the end.
    fused = torch.randn(sum(queries) + 2, (heads + 2) * head_dim, device=device).to(dtype)
    q = fused[:, : heads * head_dim].unflatten(1, (heads, head_dim))
    rest = (pool.req_to_token, pool.rows, starts_of(queries, device), pool.context_lengths)
    return q, pool, (*rest, head_dim**-0.5)


def _inputs(implementation, pool, queries, q):
    """K and V of the new tokens and the pools; the reference reads the new ones in the pools."""
    if implementation is reference:
        return q, q, pool.k, pool.v
    k, v, cached = split_new(pool, queries, len(q), q.dtype)
    return k, v, cached.k, cached.v


@pytest.mark.parametrize(("queries", "contexts"), STEPS)
@pytest.mark.parametrize("shape", SHAPES)
def test_reference_is_naive_attention(queries, contexts, shape):
    q, pool, rest = _step(queries, contexts, shape, torch.float32, torch.device("cpu"))
    out = reference.prefill_attention(q, q, q, pool.k, pool.v, *rest)[: sum(queries)]
    expected = naive_attention(q[: sum(queries)], pool, queries, rest[-1])
    assert relative_error(out, expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spoiled", ["q", "k"])
@pytest.mark.parametrize("variant", [Variant(), *VARIANTS])
def test_the_reference_of_what_is_no_number_is_none(dtype, spoiled, variant):
    """torch makes 0 of it where a sequence has fewer keys than its vectors have numbers, unless there is a mask."""
    lengths = [1, 2, 3, 7, 8, 9, 15, 16, 17, 40]
    for several in (lengths, *([length] for length in lengths)):
        q, pool, rest = _step(several, several, (4, 2, 64), dtype, torch.device("cpu"))
        pool = pool.to_int8() if variant.int8 else pool
        if spoiled == "q":
            q.fill_(torch.nan)
        else:
            (pool.k if pool.scales is None else pool.scales).fill_(torch.nan)
        out = reference.prefill_attention(q, q, q, pool.k, pool.v, *rest, **variant.options(pool, 4))
        assert out[: sum(several)].isnan().all(), several


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("queries", "contexts", "shape"),
    [
        (*STEPS[0], SHAPES[0]),
        (*STEPS[1], SHAPES[5]),
        (*STEPS[2], SHAPES[4]),
        (*STEPS[3], SHAPES[2]),
        (*STEPS[3], SHAPES[3]),
        (*STEPS[4], SHAPES[1]),
        ([140], [140], SHAPES[1]),
        ([130, 5], [135, 200], SHAPES[0]),
    ],
)
def test_kernel_matches_the_reference(queries, contexts, shape, dtype, device):
    q, pool, rest = _step(queries, contexts, shape, dtype, device)
    wide = pool.to(torch.float32)
    k, v, cached = split_new(pool, queries, len(q), dtype)
    out = launchers.prefill_attention(q, k, v, cached.k, cached.v, *rest)[: sum(queries)]
    expected = reference.prefill_attention(q.float(), q, q, wide.k, wide.v, *rest)[: sum(queries)]
    assert out.dtype == dtype
    assert relative_error(out, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[2]])
@pytest.mark.parametrize(("queries", "contexts"), STEPS[2:])
def test_reference_variants_are_naive_attention(queries, contexts, variant, shape):
    q, pool, rest = _step(queries, contexts, shape, torch.float32, torch.device("cpu"))
    pool = pool.to_int8() if variant.int8 else pool
    options = variant.options(pool, shape[0])
    out = reference.prefill_attention(q, q, q, pool.k, pool.v, *rest, **options)[: sum(queries)]
    assert relative_error(out, naive_attention(q[: sum(queries)], pool, queries, rest[-1], **options)) < 1e-6


def test_a_bias_is_made_for_a_few_sequences_at_a_time(monkeypatch):
    queries = [5, 4, 6, 7, 5]
    q, pool, rest = _step(queries, queries, (3, 1, 16), torch.float32, torch.device("cpu"))
    options = Variant(alibi=True).options(pool, 3)
    expected = reference.prefill_attention(q, q, q, pool.k, pool.v, *rest, **options)
    monkeypatch.setattr(attention, "_BIAS_ELEMENTS", 2 * 3 * 64)
    assert list(attention._groups(queries, queries, 3)) == [[0, 1], [2, 3], [4]]
    out = reference.prefill_attention(q, q, q, pool.k, pool.v, *rest, **options)
    assert relative_error(out, expected) < 1e-6


# Windows that end within a block of queries, at its edge and behind it, and chunks that begin in the middle of one.
@pytest.mark.parametrize(
    ("chunks", "variant", "dtype"),
    combinations(
        [([3, 40, 1, 17, 2], [70, 40, 65, 18, 3], SHAPES[1]), ([150], [150], SHAPES[2]), ([70], [203], (2, 2, 20))],
        VARIANTS,
        [torch.float32, torch.float16],
        every=3,
    ),
)
def test_kernel_variants_match_the_reference(chunks, variant, dtype, device):
    queries, contexts, shape = chunks
    q, pool, rest = _step(queries, contexts, shape, dtype, device)
    pool = pool.to_int8() if variant.int8 else pool
    wide = pool.to(torch.float32)
    k, v, cached = split_new(pool, queries, len(q), dtype)
    options = variant.options(cached, shape[0])
    out = launchers.prefill_attention(q, k, v, cached.k, cached.v, *rest, **options)[: sum(queries)]
    expected = reference.prefill_attention(q.float(), q, q, wide.k, wide.v, *rest, **options | {"scales": None})[
        : sum(queries)
    ]
    assert out.dtype == dtype
    assert relative_error(out, expected) < TOLERANCE[dtype]


# Chunks that end within a tile, at its edge and behind it, so that tiles reach into the next one, or into padding.
@pytest.mark.parametrize(
    ("variant", "shape"),
    combinations([Variant(), *VARIANTS], [(2, 1, 64), (1, 1, 128)], every=3),
)
def test_tiles_copied_by_descriptors_match_the_reference(variant, shape, monkeypatch, device):
    if device.type == "cpu":  # the interpreter knows descriptors
        for module in (hardware, prefill_attention):
            monkeypatch.setattr(module, "compute_capability", lambda _: (9, 0))
    queries, contexts = [70, 130, 5, 64, 0], [70, 190, 5, 64, 3]
    q, pool, rest = _step(queries, contexts, shape, torch.float16, device)
    pool = pool.to_int8() if variant.int8 else pool
    wide = pool.to(torch.float32)
    k, v, cached = split_new(pool, queries, len(q), torch.float16)
    assert device.type == "cuda" or prefill_attention.tiles(k, 64) is not None
    options = variant.options(cached, shape[0])
    out = launchers.prefill_attention(q, k, v, cached.k, cached.v, *rest, **options)[: sum(queries)]
    expected = reference.prefill_attention(q.float(), q, q, wide.k, wide.v, *rest, **options | {"scales": None})
    assert relative_error(out, expected[: sum(queries)]) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("implementation", [reference, launchers])
@pytest.mark.parametrize("decodes", [1, 64, 150])
def test_tokens_before_the_first_prompt_are_left_alone(implementation, decodes, device):
    queries, contexts = [70, 3, 0], [90, 3, 0]
    q, pool, rest = _step(queries, contexts, (2, 1, 16), torch.float32, device)
    k, v, *pools = _inputs(implementation, pool, queries, q)
    expected = implementation.prefill_attention(q, k, v, *pools, *rest)
    behind = [torch.cat([torch.full_like(x, torch.nan)[:1].expand(decodes, -1, -1), x]) for x in (q, k, v)]
    table, rows, starts, *others = rest
    out = torch.full_like(behind[0], 7.0)
    implementation.prefill_attention(*behind, *pools, table, rows, starts + decodes, *others, out=out)
    assert torch.equal(out[decodes : decodes + 73], expected[:73])
    assert (out[:decodes] == 7).all()


@pytest.mark.parametrize("implementation", [reference, launchers])
def test_blocks_before_the_window_are_not_read(implementation, device):
    q, pool, rest = _step([5], [200], (4, 2, 16), torch.float32, device)
    expected = naive_attention(q[:5], pool, [5], rest[-1], window=30)
    first_seen = 195 - 30 + 1
    block = prefill_attention.choose_prefill_blocks(16, 4, (9, 0), 5).tokens
    unseen = pool.req_to_token[int(pool.rows[0]), : first_seen // block * block].long()
    assert len(unseen) > 100
    pool.k[unseen], pool.v[unseen] = torch.nan, torch.nan
    inputs = _inputs(implementation, pool, [5], q)
    out = implementation.prefill_attention(q, *inputs, *rest, window=30)[:5]
    assert relative_error(out, expected) < 1e-5


@pytest.mark.parametrize("implementation", [reference, launchers])
def test_far_positions_keep_the_precision_of_alibi(implementation, device):
    q, pool, rest = _step([2], [3000], (2, 1, 16), torch.float32, device)
    slopes = torch.tensor([0.84, 0.004], device=device)
    expected = naive_attention(q[:2], pool, [2], rest[-1], slopes)
    inputs = _inputs(implementation, pool, [2], q)
    out = implementation.prefill_attention(q, *inputs, *rest, alibi_slopes=slopes)[:2]
    assert relative_error(out, expected) < 1e-5


@pytest.mark.parametrize("implementation", [reference, launchers])
def test_empty_sequences_change_nothing(implementation, device):
    queries, contexts = [0, 6, 0, 3], [0, 6, 9, 8]
    q, pool, rest = _step(queries, contexts, (2, 1, 16), torch.float32, device)
    expected = naive_attention(q[:9], pool, queries, rest[-1])
    inputs = _inputs(implementation, pool, queries, q)
    out = implementation.prefill_attention(q, *inputs, *rest)[:9]
    assert relative_error(out, expected) < 1e-5


@pytest.mark.parametrize("implementation", [reference, launchers])
def test_large_scores_do_not_overflow(implementation, device):
    q, pool, rest = _step([4], [20], (1, 1, 16), torch.float32, device)
    q = q * 300
    expected = naive_attention(q[:4], pool, [4], rest[-1])
    inputs = _inputs(implementation, pool, [4], q)
    out = implementation.prefill_attention(q, *inputs, *rest)[:4]
    assert relative_error(out, expected) < 1e-4


@pytest.mark.parametrize("implementation", [reference, launchers])
def test_the_result_goes_where_it_is_wanted(implementation, device):
    q, pool, rest = _step([4, 2], [9, 2], (2, 1, 16), torch.float32, device)
    inputs = _inputs(implementation, pool, [4, 2], q)
    expected = implementation.prefill_attention(q, *inputs, *rest)
    wide = q.new_full((3 + len(q), 2, 16), 7.0)
    out = implementation.prefill_attention(q, *inputs, *rest, out=wide[3:])
    assert out.data_ptr() == wide[3:].data_ptr()
    assert torch.equal(out[:6], expected[:6])
    assert (wide[:3] == 7).all()


@pytest.mark.parametrize("implementation", [reference, launchers])
def test_many_sequences(implementation, device):
    queries = [(7 * i) % 3 for i in range(140)]  # more than are looked at in one load
    q, pool, rest = _step(queries, [count + 1 for count in queries], (1, 1, 16), torch.float32, device)
    expected = naive_attention(q[: sum(queries)], pool, queries, rest[-1])
    inputs = _inputs(implementation, pool, queries, q)
    out = implementation.prefill_attention(q, *inputs, *rest)[: sum(queries)]
    assert relative_error(out, expected) < 1e-5
