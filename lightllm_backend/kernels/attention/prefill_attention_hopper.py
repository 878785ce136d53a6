# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Causal attention of whole prompts (those without cached tokens) on Hopper, in Gluon; launched by prefill_attention.

A tile is 128 queries of one head. Each multiprocessor runs one program. Its producer, a single warp, takes tiles from a
global counter and copies their queries, keys and values to shared memory, running ahead into the next tile. Two
consumers of four warps compute 64 queries each: they compute scores of the next keys while they multiply the previous
weights by values (as FlashAttention-3, arXiv 2407.08608, does within a warpgroup). Keys are read backwards, so the
first block is the one on the diagonal: only that block is masked, and only that block may extend beyond the prompt.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from lightllm_backend.kernels.attention.merge_splits import LOG2_E
from lightllm_backend.kernels.attention.whole_prompt_tiles import TILE_QUERIES
from lightllm_backend.kernels.gluon import copy_tile, synchronize, tile_descriptor
from lightllm_backend.kernels.hardware import GLUON_TRIED, compute_capability, has_descriptors, multiprocessor_count

# How many tiles of queries, and of keys and values, shared memory holds: all that fit.
_QUERY_STAGES, _STAGES = 2, 2
# Registers per thread: at the start, then of consumers, and of the producer.
_REGISTERS, _CONSUMER_REGISTERS, _PRODUCER_REGISTERS = 168, 240, 24


@gluon.jit
def _take(counter, work, total, heads):
    """The next tile's number, `total` or more at the end, and its row of the work list."""
    index = gl.atomic_add(counter, 1, sem="relaxed")
    if index == total + gl.num_programs(0) - 1:
        gl.store(counter, 0)  # the last program to ask
    entry = work + gl.minimum(index, total - 1) // heads * 3
    return index, gl.load(entry), gl.load(entry + 1), gl.load(entry + 2)


@gluon.jit
def _tell(told, slot, place: gl.constexpr, value):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    told.index(4 * slot + place).store(gl.full([1], value, gl.int32, layout))


@gluon.jit
def _hear(told, slot, place: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    return gl.max(told.index(4 * slot + place).load(layout), 0)


@gluon.jit
def _produce(
    q_tiles,
    k_tiles,
    v_tiles,
    work,
    counter,
    total,
    heads,
    group,
    shared,
    query_stages: gl.constexpr,
    stages: gl.constexpr,
):
    tiles, queries, keys, values = shared
    told, told_full = tiles
    q_shared, q_full, q_empty = queries
    k_shared, k_full, k_empty = keys
    v_shared, v_full, v_empty = values
    block: gl.constexpr = k_shared.shape[1]
    head_dim: gl.constexpr = k_shared.shape[2]
    bytes_of_tile: gl.constexpr = block * head_dim * 2
    turn = 0
    step = 0
    index, query_start, length, tile = _take(counter, work, total, heads)
    while index < total:
        head = index % heads
        slot = turn % query_stages
        mbarrier.wait(q_empty.index(slot), (turn // query_stages & 1) ^ 1)
        _tell(told, slot, 0, query_start)
        _tell(told, slot, 1, length)
        _tell(told, slot, 2, tile)
        _tell(told, slot, 3, head)
        synchronize()
        mbarrier.arrive(told_full.index(slot), count=1)
        row = query_start + tile * block
        column = head * head_dim
        mbarrier.expect(q_full.index(slot), bytes_of_tile)
        copy_tile(q_tiles, [row, column], q_full.index(slot), q_shared.index(2 * slot))
        half: gl.constexpr = block // 2
        copy_tile(q_tiles, [row + half, column], q_full.index(slot), q_shared.index(2 * slot + 1))
        column = head // group * head_dim
        count = tile + 1
        turn += 1
        for back in range(count):
            stage = step % stages
            phase = (step // stages & 1) ^ 1
            mbarrier.wait(k_empty.index(stage), phase)
            mbarrier.expect(k_full.index(stage), bytes_of_tile)
            copy_tile(k_tiles, [row, column], k_full.index(stage), k_shared.index(stage))
            mbarrier.wait(v_empty.index(stage), phase)
            mbarrier.expect(v_full.index(stage), bytes_of_tile)
            copy_tile(v_tiles, [row, column], v_full.index(stage), v_shared.index(stage))
            step += 1
            row -= block
            if back == 0:  # while there is time
                index, query_start, length, tile = _take(counter, work, total, heads)
    slot = turn % query_stages
    mbarrier.wait(q_empty.index(slot), (turn // query_stages & 1) ^ 1)
    _tell(told, slot, 3, -1)
    synchronize()
    mbarrier.arrive(told_full.index(slot), count=1)


@gluon.jit
def _zero_from(value, live):
    """Zeroes rows from `live` on, which belong to another prompt or to none, perhaps NaN. Both consumers do so."""
    rows: gl.constexpr = value.shape[0]
    columns: gl.constexpr = value.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // columns, columns // 8], [4, 1], [1, 0])
    piece_rows: gl.constexpr = 32  # more at once would take too many registers
    for first in gl.static_range(0, rows, piece_rows):
        piece = value.slice(first, piece_rows, dim=0)
        row = first + gl.arange(0, piece_rows, layout=gl.SliceLayout(1, layout))
        zeros = gl.zeros([piece_rows, columns], value.dtype, layout)
        piece.store(gl.where((row < live)[:, None], piece.load(layout), zeros))
    fence_async_shared()
    synchronize()


@gluon.jit
def _leave(barrier):
    """Tells the producer that this consumer is done with what the barrier guards."""
    synchronize()
    mbarrier.arrive(barrier, count=1)


@gluon.jit
def _consume(half, out, out_stride, scale_log2, shared, query_stages: gl.constexpr, stages: gl.constexpr):
    tiles, queries, keys, values = shared
    told, told_full = tiles
    q_shared, q_full, q_empty = queries
    k_shared, k_full, k_empty = keys
    v_shared, v_full, v_empty = values
    dtype: gl.constexpr = k_shared.dtype
    block: gl.constexpr = k_shared.shape[1]
    head_dim: gl.constexpr = k_shared.shape[2]
    rows: gl.constexpr = block // 2
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, block, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, head_dim, 16])
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    # Eight adjacent elements per thread, from threads of the same warp.
    registers: gl.constexpr = (
        [[0, 1], [0, 2], [0, 4], [0, 32], [0, 64], [8, 0]]
        if head_dim == 128
        else [[0, 1], [0, 2], [0, 4], [0, 32], [8, 0]]
    )
    store_layout: gl.constexpr = gl.DistributedLinearLayout(
        registers, [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [rows, head_dim]
    )
    zeros = gl.zeros([rows, block], gl.float32, score_layout)
    row = half * rows + gl.arange(0, rows, layout=gl.SliceLayout(1, score_layout))
    token = gl.arange(0, block, layout=gl.SliceLayout(0, score_layout))
    out_row = half * rows + gl.arange(0, rows, layout=gl.SliceLayout(1, store_layout))
    column = gl.arange(0, head_dim, layout=gl.SliceLayout(0, store_layout))
    turn = 0
    step = 0
    mbarrier.wait(told_full.index(0), 0)
    head = _hear(told, 0, 3)
    while head >= 0:
        slot = turn % query_stages
        query_start = _hear(told, slot, 0)
        length = _hear(told, slot, 1)
        tile = _hear(told, slot, 2)
        origin = tile * block
        query = q_shared.index(2 * slot + half)
        mbarrier.wait(q_full.index(slot), turn // query_stages & 1)
        stage = step % stages
        phase = step // stages & 1
        mbarrier.wait(k_full.index(stage), phase)
        key = k_shared.index(stage).permute((1, 0))
        score = hopper.warpgroup_mma(query, key, zeros, use_acc=False, is_async=True)
        score = hopper.warpgroup_mma_wait(0, deps=(score,))
        _leave(k_empty.index(stage))
        score = gl.where(token[None, :] <= row[:, None], score, float("-inf"))
        maximum = gl.max(score, 1) * scale_log2
        weight = gl.exp2(score * scale_log2 - maximum[:, None])
        total = gl.sum(weight, 1)
        operand = gl.convert_layout(weight.to(dtype), weight_layout)
        mbarrier.wait(v_full.index(stage), phase)
        if length - origin < block:
            _zero_from(v_shared.index(stage), length - origin)
        accumulator = gl.zeros([rows, head_dim], gl.float32, out_layout)
        step += 1
        for _ in range(tile):
            next_stage = step % stages
            next_phase = step // stages & 1
            mbarrier.wait(k_full.index(next_stage), next_phase)
            key = k_shared.index(next_stage).permute((1, 0))
            score = hopper.warpgroup_mma(query, key, zeros, use_acc=False, is_async=True)
            pending = hopper.warpgroup_mma(operand, v_shared.index(stage), accumulator, is_async=True)
            score = hopper.warpgroup_mma_wait(1, deps=(score,))
            _leave(k_empty.index(next_stage))
            new_maximum = gl.maximum(maximum, gl.max(score, 1) * scale_log2)
            weight = gl.exp2(score * scale_log2 - new_maximum[:, None])
            correction = gl.exp2(maximum - new_maximum)
            total = total * correction + gl.sum(weight, 1)
            maximum = new_maximum
            # Needed in the next turn only, but without this branch ptxas would wait for the previous product.
            mbarrier.wait(v_full.index(next_stage), next_phase)
            accumulator = hopper.warpgroup_mma_wait(0, deps=(pending,))
            _leave(v_empty.index(stage))
            accumulator = accumulator * gl.convert_layout(correction, gl.SliceLayout(1, out_layout))[:, None]
            operand = gl.convert_layout(weight.to(dtype), weight_layout)
            stage = next_stage
            step += 1
        _leave(q_empty.index(slot))
        pending = hopper.warpgroup_mma(operand, v_shared.index(stage), accumulator, is_async=True)
        norm = gl.convert_layout(1.0 / total, gl.SliceLayout(1, out_layout))
        accumulator = hopper.warpgroup_mma_wait(0, deps=(pending,))
        _leave(v_empty.index(stage))
        result = gl.convert_layout((accumulator * norm[:, None]).to(dtype), store_layout)
        begin = out + (query_start + origin).to(gl.int64) * out_stride + head * head_dim
        address = begin + out_row[:, None] * out_stride + column[None, :]
        gl.store(address, result, mask=(out_row < length - origin)[:, None])
        turn += 1
        mbarrier.wait(told_full.index(turn % query_stages), turn // query_stages & 1)
        head = _hear(told, turn % query_stages, 3)


@gluon.jit
def _barriers(count: gl.constexpr, arrivals: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [count, 1], mbarrier.MBarrierLayout())
    for index in gl.static_range(count):
        mbarrier.init(barriers.index(index), count=arrivals)
    return barriers


@gluon.jit(do_not_specialize=["total", "heads", "group"])
def prefill_attention_hopper_kernel(
    q_tiles,
    k_tiles,
    v_tiles,
    out,
    work,
    counter,
    out_stride,
    total,
    heads,
    group,
    scale_log2,
    head_dim: gl.constexpr,
    block: gl.constexpr,
    query_stages: gl.constexpr,
    stages: gl.constexpr,
    consumer_registers: gl.constexpr,
    producer_registers: gl.constexpr,
):
    """Full barriers count one arrival, the producer's; empty barriers count two, one per consumer."""
    dtype: gl.constexpr = q_tiles.dtype
    q_shared = gl.allocate_shared_memory(dtype, [2 * query_stages, block // 2, head_dim], q_tiles.layout)
    k_shared = gl.allocate_shared_memory(dtype, [stages, block, head_dim], k_tiles.layout)
    v_shared = gl.allocate_shared_memory(dtype, [stages, block, head_dim], v_tiles.layout)
    told = gl.allocate_shared_memory(gl.int32, [4 * query_stages, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    tiles = (told, _barriers(query_stages, 1))
    queries = (q_shared, _barriers(query_stages, 1), _barriers(query_stages, 2))
    keys = (k_shared, _barriers(stages, 1), _barriers(stages, 2))
    values = (v_shared, _barriers(stages, 1), _barriers(stages, 2))
    fence_async_shared()
    synchronize()
    shared = (tiles, queries, keys, values)
    gl.warp_specialize(
        [
            (_consume, (0, out, out_stride, scale_log2, shared, query_stages, stages)),
            (_consume, (1, out, out_stride, scale_log2, shared, query_stages, stages)),
            (_produce, (q_tiles, k_tiles, v_tiles, work, counter, total, heads, group, shared, query_stages, stages)),
        ],
        [4, 1],
        [consumer_registers, producer_registers],
    )


@lru_cache
def _counter(device: torch.device) -> Tensor:
    """Counts the tiles taken; 0 between launches, which must not overlap."""
    return torch.zeros(1, dtype=torch.int32, device=device)


def _tiles(x: Tensor, block_tokens: int) -> Any:
    """A TMA descriptor for tiles [block_tokens, head_dim] of `x` [tokens, heads, head_dim]."""
    tokens, heads, head_dim = x.shape
    return tile_descriptor(x, (tokens, heads * head_dim), (block_tokens, head_dim))


def is_made_for(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernel can compute attention of these tensors on their GPU."""
    return (
        GLUON_TRIED
        and compute_capability(q.device) == (9, 0)
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[2] in (64, 128)
        and all(x.stride(1) == q.shape[2] for x in (q, k, v))
        and has_descriptors(q, k, v)
    )


def prefill_attention_hopper(q: Tensor, k: Tensor, v: Tensor, work: Tensor, scale: float, out: Tensor) -> Tensor:
    """Write attention of the tiles in `work` [m, 3] (see WholePromptTiles) to `out` [tokens, heads, head_dim].

    `q` is [tokens, heads, head_dim], `k` and `v` are [tokens, kv_heads, head_dim]. Other rows of `out` are not written.
    """
    _, heads, head_dim = q.shape
    assert all(x.stride(1) == head_dim and x.stride(2) == 1 for x in (q, k, v, out))
    total = len(work) * heads
    prefill_attention_hopper_kernel[(min(multiprocessor_count(q.device), total),)](
        _tiles(q, TILE_QUERIES // 2),
        _tiles(k, TILE_QUERIES),
        _tiles(v, TILE_QUERIES),
        out,
        work,
        _counter(q.device),
        out.stride(0),
        total,
        heads,
        heads // k.shape[1],
        scale * LOG2_E.value,
        head_dim=head_dim,
        block=TILE_QUERIES,
        query_stages=_QUERY_STAGES,
        stages=_STAGES,
        consumer_registers=_CONSUMER_REGISTERS,
        producer_registers=_PRODUCER_REGISTERS,
        num_warps=4,
        maxnreg=_REGISTERS,
    )
    return out
