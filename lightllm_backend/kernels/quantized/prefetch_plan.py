# SPDX-License-Identifier: Apache-2.0
"""Plan: what a compiled quantized_prefetch_kernel is made for, and how it follows from blocks and kinds."""

import math
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from triton.experimental.gluon import language as gl

from lightllm_backend.kernels.linear.linear_prefetch import (
    MAX_REGISTERS,
    MULTIPROCESSOR_REGISTERS,
    PRODUCER_REGISTERS,
)
from lightllm_backend.kernels.quantized.choice import MAX_BLOCK_TOKENS, PrefetchBlocks, row_tiles_of
from lightllm_backend.kernels.quantized.fragments import CHUNK
from lightllm_backend.kernels.quantized.rounded_tokens import PAIR_FACTORS
from lightllm_backend.kernels.quantized.unpacking import unpacking

# See product_layout.
MAX_MMA_COLUMNS = 8


@dataclass(frozen=True, eq=False)
class Plan:
    """What a compiled quantized_prefetch_kernel is made for. Compared by identity, as each launch looks it up.

    A step is one stage of shared memory: `parts` tiles of the weight, one behind the other, for each of the `row_tiles`
    tiles of rows. A tile has `spans` of columns, each within a group of the weight, and meets as many tiles of x.
    """

    is_int4: bool
    has_zeros: bool
    has_bias: bool
    is_gated: bool
    is_gelu: bool
    is_paired: bool
    pair_factors: tuple[float, float]  # of a pair's sums, in the token's
    is_ahead: bool  # whether weights are unpacked while the tensor cores multiply those before
    is_scaled: bool  # whether scales multiply the weights, not their sums
    asm: str  # PTX that unpacks weights, or "": see multiply
    zero_offset: float  # of numbers of 4 bits as `asm` makes them
    rows: int  # of a tile
    row_tiles: int
    row_bytes: int  # of a row of a tile
    tokens: int
    columns: int  # of x's tiles: tokens, or twice as many
    span_columns: int
    parts: int
    spans: int
    spans_per_group: int  # 0: the weight has one group
    max_groups: int  # that a program touches
    stages: int
    consumers: int  # that take steps in turns
    warps: int  # of a consumer
    consumer_registers: int
    words_layout: gl.DistributedLinearLayout  # of a tile's bytes
    span_layout: gl.DistributedLinearLayout  # of a span's
    layout: gl.NVMMADistributedLayout  # of sums


@cache
def plan_of(
    blocks: PrefetchBlocks,
    tokens: int,
    kind: str,
    dtype: torch.dtype,
    group_size: int,
    max_groups: int,
    has_zeros: bool,
    has_bias: bool,
    is_direct: bool,
    is_gated: bool,
    is_gelu: bool,
    is_paired: bool,
) -> Plan:
    """For weights of this kind and activations of this dtype; `max_groups` is 1 if the weight has one group."""
    row_tiles, is_int4, is_grouped = row_tiles_of(blocks), kind == "int4", max_groups > 1 or has_zeros
    rows, columns = blocks.out // row_tiles, tokens * (2 if is_paired else 1)
    # Each stage is one consumer's. A barrier knows the parity of its phase only: a consumer that had not waited for the
    # stage's last phase could take the one before it for the next.
    assert blocks.stages % blocks.consumers == 0
    # A consumer releases a stage once it has started on its next one.
    assert blocks.stages >= 2 * blocks.consumers
    # Three consumers start with too few registers for sums of 256 tokens.
    assert row_tiles == 1 or (blocks.consumers == 1 and tokens <= MAX_BLOCK_TOKENS)
    # A stage has several tiles if it holds more than the 128 bytes a row that one copy may have. A tile has two spans
    # of columns if it holds two groups, or more of 64 if some are unpacked while others are multiplied.
    tile_columns = min(blocks.inner, 256 if is_int4 else 128, 2 * group_size)
    layout = product_layout(columns, blocks.warps, is_direct, is_int4)
    # Weights are unpacked while the tensor cores multiply those before. Several programs of a multiprocessor do so for
    # each other. Nothing may touch sums meanwhile, so the scales of groups multiply the weights: those of 4 bits are so
    # coarse that rounding them to 16 bits does not matter.
    is_ahead = (
        blocks.programs_per_sm * blocks.consumers * row_tiles == 1
        and blocks.inner >= 2 * CHUNK
        and layout.version[0] == 3
        and not is_direct
        and (is_int4 or not is_grouped)
    )
    # Nor have three consumers registers for sums of 128 tokens of each group.
    is_scaled = is_grouped and (is_ahead or (is_int4 and row_tiles > 1 and tokens > 64))
    span_columns = CHUNK if is_ahead else math.gcd(tile_columns, group_size) if max_groups > 1 else tile_columns
    if is_direct:  # 128 bytes of activations
        span_columns = math.gcd(span_columns, 128)
    spans = tile_columns // span_columns
    row_bytes = tile_columns // 2 if is_int4 else tile_columns
    assert blocks.inner % tile_columns == 0
    assert group_size % span_columns == 0
    unit = 16.0 if is_int4 else 1.0  # int4 enters the product of pairs 16 times as large as it is
    one = 128.0 if dtype == torch.bfloat16 else 1024.0
    return Plan(
        is_int4=is_int4,
        has_zeros=has_zeros,
        has_bias=has_bias,
        is_gated=is_gated,
        is_gelu=is_gelu,
        is_paired=is_paired,
        pair_factors=(PAIR_FACTORS[dtype] / unit, 1.0 / unit) if is_paired else (1.0, 1.0),
        is_ahead=is_ahead,
        is_scaled=is_scaled,
        asm="" if is_direct else unpacking(kind, dtype, has_zeros, is_scaled),
        zero_offset=one if is_int4 else 0.0,
        rows=rows,
        row_tiles=row_tiles,
        row_bytes=row_bytes,
        tokens=tokens,
        columns=columns,
        span_columns=span_columns,
        parts=blocks.inner // tile_columns,
        spans=spans,
        spans_per_group=group_size // span_columns if is_grouped else 0,
        max_groups=max_groups,
        stages=blocks.stages,
        consumers=blocks.consumers,
        warps=blocks.warps,
        consumer_registers=registers_of(blocks)[1],
        words_layout=words_layout(rows, row_bytes, blocks.warps, is_int4),
        span_layout=words_layout(rows, row_bytes // spans, blocks.warps, is_int4),
        layout=layout,
    )


@lru_cache
def words_layout(rows: int, row_bytes: int, warps: int, is_int4: bool) -> gl.DistributedLinearLayout:
    """Which thread holds which bytes of a tile: those of the weights that it hands to the tensor cores.

    In each 16 rows of a warp and each chunk of 64 columns, lane 4g + t has rows g and g + 8, and the t-th quarter.
    """
    chunk = CHUNK // 2 if is_int4 else CHUNK
    quarter = chunk // 4

    def powers(first: int, end: int) -> list[int]:
        return [first << n for n in range((end // first).bit_length() - 1)]

    in_warps = 16 * warps
    registers = [[0, n] for n in powers(1, quarter)] + [[8, 0]]
    registers += [[0, n] for n in powers(chunk, row_bytes)] + [[n, 0] for n in powers(in_warps, rows)]
    lanes = [[0, n] for n in powers(quarter, chunk)] + [[n, 0] for n in (1, 2, 4)]
    return gl.DistributedLinearLayout(registers, lanes, [[n, 0] for n in powers(16, in_warps)], [], [rows, row_bytes])


@lru_cache
def product_layout(columns: int, warps: int, is_direct: bool, is_int4: bool) -> gl.NVMMADistributedLayout:
    """Which thread holds which sums, and hence the instruction: warpgroup_mma, or Ampere's mma for few tokens.

    A warpgroup_mma whose left operand comes from registers takes as long for 8 tokens as for 64 (measured on an H200).
    """
    if columns <= MAX_MMA_COLUMNS and (is_int4 or not is_direct):
        return gl.NVMMADistributedLayout([2, 0], [warps, 1], [16, 8])
    return gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, columns, 32 if is_direct else 16])


def registers_of(blocks: PrefetchBlocks) -> tuple[int, int]:
    """Registers of a thread at the start, and of a consumer's, if the planned programs share a multiprocessor.

    The producer's warp counts as four.
    """
    warps = blocks.warps * blocks.consumers * row_tiles_of(blocks)
    most = min(MAX_REGISTERS, MULTIPROCESSOR_REGISTERS // (32 * (warps + 4) * blocks.programs_per_sm) // 8 * 8)
    return most, min(240, (most * (warps + 4) - 4 * PRODUCER_REGISTERS) // warps // 8 * 8)
