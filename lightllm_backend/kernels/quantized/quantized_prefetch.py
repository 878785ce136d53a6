# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Products of up to 256 tokens with a weight of 4 or 8 bits for Hopper, in Gluon: linear_prefetch for fewer bytes.

The producer is linear_prefetch's: it copies weights ahead while the previous kernel drains, and asks for some more into
the L2 cache. The consumers read weights from shared memory as they lie there, turn them into 16 bits in registers, and
hand them to the tensor cores from there.
For this, the columns of the weight are in the order of fragments.py: then a thread's weights lie side by side, and a
word becomes pairs of 16 bits by a shift and two or three operations on both of a pair at once.

A direct product, of fp8 with activations in fp8, needs none of that (`asm` is empty): the tensor cores read both. Nor
does one of int4 with pairs of int8, which meets the weights as int8, three operations on eight of them. Of a pair's two
columns, the last step makes the token's sum.

Where the tensor cores take longer than the memory, they are never waited for: see plan_of. ptxas waits for each of
their products all the same if it cannot follow the registers, and only tells in its log; a test reads that. With three
tiles of rows, the consumers overlap each other instead: one multiplies while another unpacks.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from lightllm_backend.kernels.dependent_launch import dependent_launch
from lightllm_backend.kernels.gluon import (
    activated,
    copy_by_threads,
    copy_tile,
    shared_layout,
    synchronize,
    tile_descriptor,
)
from lightllm_backend.kernels.linear.linear_prefetch import PRODUCER_REGISTERS
from lightllm_backend.kernels.quantized.choice import PrefetchBlocks, kind_of, most_groups
from lightllm_backend.kernels.quantized.prefetch_plan import plan_of, registers_of
from lightllm_backend.kernels.quantized.prefetch_products import multiply
from lightllm_backend.kernels.quantized.weight import QuantizedWeight
from lightllm_backend.kernels.sizes import cdiv, next_power_of_2

PRODUCER = gl.constexpr(PRODUCER_REGISTERS)


@gluon.jit
def _feature_of(index, row, features, is_gated: gl.constexpr):
    """The output feature that rows of a tile which begins at feature `row` are for, and their rows of the weight.

    In a gated tile, 8 rows of the gate precede those of `up` for the same features: a thread of the tensor cores, which
    has rows 8 apart, then has both.
    """
    feature = row + index
    weight_row = feature
    if is_gated:
        feature = row + index // 16 * 8 + index % 8
        weight_row = feature + index // 8 % 2 * features
    return feature, weight_row


@gluon.jit
def _copy_weights(weight_tiles, w_shared, full, stage, row, step, plan: gl.constexpr):
    parts: gl.constexpr = plan.parts
    row_tiles: gl.constexpr = plan.row_tiles
    for part in gl.static_range(parts):
        for row_tile in gl.static_range(row_tiles):
            tile = (stage * parts + part) * row_tiles + row_tile
            column = (step * parts + part) * plan.row_bytes
            if plan.is_gated:  # [features / 8, 2, 8, columns]: see _feature_of
                eighth = row // 8 + row_tile * w_shared.shape[1]
                copy_tile(weight_tiles, [eighth, 0, 0, column], full.index(stage), w_shared.index(tile))
            else:
                first = row + row_tile * plan.rows
                copy_tile(weight_tiles, [first, column], full.index(stage), w_shared.index(tile))


@gluon.jit
def _copy_x(x_tiles, x_shared, full, stage, token, step, plan: gl.constexpr):
    tiles: gl.constexpr = plan.parts * plan.spans
    for tile in gl.static_range(tiles):
        column = (step * tiles + tile) * plan.span_columns
        copy_tile(x_tiles, [token, column], full.index(stage), x_shared.index(stage * tiles + tile))


@gluon.jit
def _fetch_into_l2(weight_bytes, row_stride, row, first, end, features, plan: gl.constexpr):
    """Asks for the bytes from `first` to `end` of a tile's rows, so that copies find them in the L2 cache."""
    index = gl.arange(0, plan.rows, layout=gl.BlockedLayout([1], [32], [1], [0]))
    feature, weight_row = _feature_of(index, row, features, plan.is_gated)
    address = (weight_bytes + weight_row.to(gl.int64) * row_stride + first).to(gl.int64)
    size = gl.where(feature < features, end - first, 0)
    gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.gt.s32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
        "=r,l,r",
        [address, size],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _produce(source, corner, place, shared, is_dependent: gl.constexpr, plan: gl.constexpr):
    x_tiles, weight_tiles, weight_bytes, row_stride, fetched = source
    features, row, token = corner
    w_shared, x_shared, full, empty = shared
    parts: gl.constexpr = plan.parts
    row_tiles: gl.constexpr = plan.row_tiles
    x_bytes: gl.constexpr = plan.columns * plan.span_columns * x_shared.dtype.primitive_bitwidth // 8
    bytes_of_stage: gl.constexpr = parts * (row_tiles * plan.rows * plan.row_bytes + plan.spans * x_bytes)
    begin, steps = place
    ahead = gl.minimum(steps, plan.stages)
    for step in range(ahead):
        mbarrier.expect(full.index(step), bytes_of_stage)
        _copy_weights(weight_tiles, w_shared, full, step, row, begin + step, plan)
    first = (begin + ahead) * parts * plan.row_bytes
    end = gl.minimum(first + fetched, (begin + steps) * parts * plan.row_bytes)
    if fetched > 0:
        for row_tile in gl.static_range(row_tiles):
            first_row = row + row_tile * (plan.rows // 2 if plan.is_gated else plan.rows)
            _fetch_into_l2(weight_bytes, row_stride, first_row, first, end, features, plan)
    if is_dependent:  # see dependent_launch
        gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
        gl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
        )
    for step in range(ahead):
        _copy_x(x_tiles, x_shared, full, step, token, begin + step, plan)
    for step in range(ahead, steps):
        stage = step % plan.stages
        mbarrier.wait(empty.index(stage), (step // plan.stages & 1) ^ 1)
        mbarrier.expect(full.index(stage), bytes_of_stage)
        _copy_weights(weight_tiles, w_shared, full, stage, row, begin + step, plan)
        _copy_x(x_tiles, x_shared, full, stage, token, begin + step, plan)


@gluon.jit
def _copy_groups(of_groups, g_shared, first, groups, row, features, plan: gl.constexpr):
    """Starts to copy the scales, or the zero points, of a tile's rows, `groups` times, to `first` and behind it."""
    per_thread: gl.constexpr = 32 // g_shared.dtype.primitive_bitwidth
    warps: gl.constexpr = plan.warps
    layout: gl.constexpr = gl.BlockedLayout([per_thread], [32], [warps], [0])
    index = gl.arange(0, plan.rows, layout=layout)
    feature, weight_row = _feature_of(index, row, features, plan.is_gated)
    of_weight = features * 2 if plan.is_gated else features
    address = of_groups + weight_row
    for group in range(groups):
        copy_by_threads(g_shared.index(first + group), address + group * of_weight, mask=feature < features)


@gluon.jit
def _write_result(total, result, scales, plan: gl.constexpr):
    """Finishes the sums [rows, columns of x] of a tile, and stores them."""
    bias, x_scales, out, row, first_token, split, tokens, features = result
    rows: gl.constexpr = plan.rows
    columns: gl.constexpr = plan.columns
    layout: gl.constexpr = plan.layout
    warps: gl.constexpr = plan.warps
    width: gl.constexpr = rows // 2 if plan.is_gated else rows
    columns_of_token: gl.constexpr = 2 if plan.is_paired else 1
    index = gl.arange(0, rows, layout=gl.SliceLayout(1, layout))
    feature, weight_row = _feature_of(index, row, features, plan.is_gated)
    if plan.spans_per_group == 0:
        scale = gl.load(scales + weight_row, mask=feature < features, other=0.0).to(gl.float32)
        total *= scale[:, None]
    if plan.is_paired:  # both of a pair become the token's sum; the second one's is not stored
        high, low = gl.split(total.reshape([rows, columns // 2, 2]))
        whole = high * plan.pair_factors[0] + low * plan.pair_factors[1]
        total = gl.convert_layout(gl.join(whole, whole).reshape([rows, columns]), layout)
    if plan.asm == "":
        token = first_token + gl.arange(0, columns, layout=gl.SliceLayout(0, layout)) // columns_of_token
        total *= gl.load(x_scales + token, mask=token < tokens, other=0.0)[None, :]
    if plan.has_bias:
        added = gl.load(bias + weight_row, mask=feature < features, other=0.0)
        total += gl.where(split == 0, added.to(gl.float32), 0.0)[:, None]
    if plan.is_gated:
        gate, up = gl.split(total.reshape([rows // 16, 2, 8, columns]).permute((0, 2, 3, 1)))
        total = (activated(gate, plan.is_gelu) * up).reshape([width, columns])
    elif plan.is_gelu:
        total = activated(total, plan.is_gelu)
    # In float32, the 8 neighbouring rows that threads hold fill a sector of memory: no other layout is needed.
    is_whole: gl.constexpr = out.dtype.element_ty == gl.float32
    store_layout: gl.constexpr = layout if is_whole else gl.BlockedLayout([4, 1], [8, 4], [1, warps], [0, 1])
    total = gl.convert_layout(total.to(out.dtype.element_ty), store_layout)
    feature = row + gl.arange(0, width, layout=gl.SliceLayout(1, store_layout))
    column = gl.arange(0, columns, layout=gl.SliceLayout(0, store_layout))
    token = first_token + column // columns_of_token
    address = out + (split * tokens + token)[None, :] * features + feature[:, None]
    live = (token < tokens) & (column % columns_of_token == 0)
    gl.store(address, total, mask=live[None, :] & (feature < features)[:, None])


@gluon.jit
def _consume(result, place, shared, of_groups, tables, sums, row_tile: gl.constexpr, plan: gl.constexpr):
    """The first consumer: it copies scales and zero points, adds the other's sum to its own, and writes the result.

    Of three tiles of rows, each has a consumer like this one, which takes all steps.
    """
    bias, x_scales, out, row, first_token, split, tokens, features = result
    row += row_tile * (plan.rows // 2 if plan.is_gated else plan.rows)
    result = (bias, x_scales, out, row, first_token, split, tokens, features)
    begin, steps = place
    scales, zeros = tables
    s_shared, z_shared, copied = of_groups
    r_shared, summed = sums
    of_weight = features * 2 if plan.is_gated else features
    if plan.spans_per_group > 0:
        spans_of_step: gl.constexpr = plan.parts * plan.spans
        first_group = begin * spans_of_step // plan.spans_per_group
        groups = ((begin + steps) * spans_of_step - 1) // plan.spans_per_group + 1 - first_group
        offset = first_group.to(gl.int64) * of_weight
        first_place: gl.constexpr = row_tile * plan.max_groups
        _copy_groups(scales + offset, s_shared, first_place, groups, row, features, plan)
        if plan.has_zeros:
            _copy_groups(zeros + offset, z_shared, first_place, groups, row, features, plan)
        async_copy.commit_group()
        async_copy.wait_group(0)
        synchronize()
        if plan.row_tiles == 1:
            mbarrier.arrive(copied, count=1)
    total = multiply(place, shared, of_groups, 0, row_tile, plan)
    if plan.consumers > 1:
        mbarrier.wait(summed, 0)
        total += r_shared.load(plan.layout)
    _write_result(total, result, scales, plan)
    # Only now: else the memory of barriers that nothing waits for would be used to rearrange the result.
    if row_tile == 0:
        mbarrier.invalidate(copied)
        mbarrier.invalidate(summed)


@gluon.jit
def _consume_second(place, shared, of_groups, sums, plan: gl.constexpr):
    """The second consumer, which leaves its sum in shared memory."""
    r_shared, summed = sums
    total = multiply(place, shared, of_groups, 1, 0, plan)
    r_shared.store(total)
    synchronize()
    mbarrier.arrive(summed, count=1)


@gluon.jit(do_not_specialize=["fetched", "tokens", "steps_of_split", "all_steps"])
def quantized_prefetch_kernel(
    x_tiles,
    weight_tiles,
    scales,
    zeros,
    bias,
    x_scales,
    out,
    weight_bytes,
    row_stride,
    fetched,
    tokens,
    features,
    steps_of_split,
    all_steps,
    is_dependent: gl.constexpr,
    plan: gl.constexpr,
):
    """Computes a block of features for a block of tokens, over one split of the inner dimension. If gated, half of the
    block's rows belong to the gate, half to `up`. One or two consumers take the steps in turns, or three a third of the
    rows each, for which tokens are read less often."""
    rows: gl.constexpr = plan.rows
    row_tiles: gl.constexpr = plan.row_tiles
    stages: gl.constexpr = plan.stages
    columns: gl.constexpr = plan.columns
    rows_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    sums_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0, 1])
    tiles: gl.constexpr = stages * plan.parts * row_tiles
    tiles_of_x: gl.constexpr = stages * plan.parts * plan.spans
    tiles_shape: gl.constexpr = [tiles] + weight_tiles.block_shape  # noqa: RUF005 - Triton-lang knows no [tiles, *...]
    w_shared = gl.allocate_shared_memory(weight_tiles.dtype, tiles_shape, weight_tiles.layout)
    x_shared = gl.allocate_shared_memory(x_tiles.dtype, [tiles_of_x, columns, plan.span_columns], x_tiles.layout)
    s_shared = gl.allocate_shared_memory(scales.dtype.element_ty, [row_tiles * plan.max_groups, rows], rows_layout)
    of_zeros: gl.constexpr = row_tiles * plan.max_groups if plan.has_zeros else 1
    z_shared = gl.allocate_shared_memory(gl.int8, [of_zeros, rows], rows_layout)
    sums_rows: gl.constexpr = rows if plan.consumers > 1 else 16
    r_shared = gl.allocate_shared_memory(gl.float32, [sums_rows, columns], sums_layout)
    full = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    once = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(stages):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=row_tiles)
    mbarrier.init(once.index(0), count=1)
    mbarrier.init(once.index(1), count=1)
    fence_async_shared()
    synchronize()
    # Programs that read the same weights are neighbours.
    token = gl.program_id(0) * plan.tokens
    row = gl.program_id(1) * (rows * row_tiles // 2 if plan.is_gated else rows * row_tiles)
    split = gl.program_id(2)
    begin = split * steps_of_split
    place = (begin, gl.minimum(steps_of_split, all_steps - begin))
    shared = (w_shared, x_shared, full, empty)
    result = (bias, x_scales, out, row, token, split, tokens, features)
    of_groups = (s_shared, z_shared, once.index(0))
    tables = (scales, zeros)
    sums = (r_shared, once.index(1))
    source = (x_tiles, weight_tiles, weight_bytes, row_stride, fetched)
    corner = (features, row, token)
    warps: gl.constexpr = plan.warps
    registers: gl.constexpr = plan.consumer_registers
    if row_tiles > 1:
        gl.warp_specialize(
            [
                (_consume, (result, place, shared, of_groups, tables, sums, 0, plan)),
                (_consume, (result, place, shared, of_groups, tables, sums, 1, plan)),
                (_consume, (result, place, shared, of_groups, tables, sums, 2, plan)),
                (_produce, (source, corner, place, shared, is_dependent, plan)),
            ],
            [warps, warps, 1],
            [registers, registers, PRODUCER],
        )
    elif plan.consumers == 1:
        gl.warp_specialize(
            [
                (_consume, (result, place, shared, of_groups, tables, sums, 0, plan)),
                (_produce, (source, corner, place, shared, is_dependent, plan)),
            ],
            [1],
            [PRODUCER],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (result, place, shared, of_groups, tables, sums, 0, plan)),
                (_consume_second, (place, shared, of_groups, sums, plan)),
                (_produce, (source, corner, place, shared, is_dependent, plan)),
            ],
            [warps, 1],
            [registers, PRODUCER],
        )


def launch_quantized_prefetch(
    x: Tensor,
    x_scales: Tensor | None,
    weight: QuantizedWeight,
    bias: Tensor | None,
    out: Tensor,
    blocks: PrefetchBlocks,
    is_gated: bool,
    is_gelu: bool = False,
    is_paired: bool = False,
) -> None:
    """Write the product's parts to `out` [splits, tokens, features], float32 or of the activations' type.

    `weight` is [features, in_features], if gated [2 * features, in_features]. A gated product and GELU, of the gate or
    of the whole product, allow one split only.
    """
    tokens, features, in_features = out.shape[1], out.shape[2], x.shape[1]
    # A tensor core takes at least 8 columns of activations.
    least_tokens = 4 if is_paired else 8
    block_tokens = min(blocks.tokens, max(least_tokens, next_power_of_2(tokens)))
    rows = blocks.out // 2 if is_gated else blocks.out  # of the result
    steps = in_features // blocks.inner
    steps_of_split = cdiv(steps, blocks.splits)
    assert weight.in_fragments
    assert out.is_contiguous()
    assert weight.shape == (features * (2 if is_gated else 1), in_features)
    assert in_features % blocks.inner == 0
    # Each consumer has a step in the last split too.
    assert (blocks.splits - 1) * steps_of_split + blocks.consumers <= steps
    assert blocks.splits == 1 or not (is_gated or is_gelu)
    plan = plan_of(
        blocks,
        block_tokens,
        kind_of(weight),
        x.dtype,
        weight.group_size,
        most_groups(weight, steps_of_split * blocks.inner) if weight.num_groups > 1 else 1,
        has_zeros=weight.zeros is not None,
        has_bias=bias is not None,
        is_direct=x_scales is not None,
        is_gated=is_gated,
        is_gelu=is_gelu,
        is_paired=is_paired,
    )
    values = weight.values if plan.asm == "" and not plan.is_int4 else weight.values.view(torch.int8)
    shape, strides, block = list(values.shape), [values.stride(0), 1], [plan.rows, plan.row_bytes]
    if is_gated:  # see _feature_of
        shape, block = [features // 8, 2, 8, shape[1]], [plan.rows // 16, 2, 8, plan.row_bytes]
        strides = [8 * strides[0], features * strides[0], *strides]
    layout = shared_layout(tuple(block), values.dtype)
    most, _ = registers_of(blocks)
    quantized_prefetch_kernel[(cdiv(tokens, block_tokens), cdiv(features, rows), blocks.splits)](
        tile_descriptor(x, x.shape, (plan.columns, plan.span_columns)),
        TensorDescriptor(values, shape, strides, block, layout),
        weight.scales,
        weight.scales if weight.zeros is None else weight.zeros,
        weight.scales if bias is None else bias,
        weight.scales if x_scales is None else x_scales,
        out,
        values.view(torch.int8),
        values.stride(0) * values.element_size(),
        blocks.fetched // 2 if plan.is_int4 else blocks.fetched,
        tokens,
        features,
        steps_of_split,
        steps,
        plan=plan,
        num_warps=blocks.warps,
        maxnreg=most,
        **dependent_launch(x.device),
    )
