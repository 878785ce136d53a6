# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""What a consumer of quantized_prefetch does with the tiles in shared memory: it unpacks weights and multiplies."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from lightllm_backend.kernels.gluon import synchronize
from lightllm_backend.kernels.quantized.unpacking import INT4_INTO_INT8

INTO_INT8 = gl.constexpr(INT4_INTO_INT8)


@gluon.jit
def _tile_of(w_shared, tile, plan: gl.constexpr):
    """A tile of the weight: [rows, bytes]."""
    rows: gl.constexpr = plan.rows
    row_bytes: gl.constexpr = plan.row_bytes
    weights = w_shared.index(tile)
    if plan.is_gated:
        weights = weights.reshape([rows, row_bytes])
    return weights


@gluon.jit
def _span_of(words, span: gl.constexpr, plan: gl.constexpr):
    """One of the 1, 2 or 4 spans of columns of `words` [rows, bytes], which are registers of the same threads."""
    rows: gl.constexpr = plan.rows
    row_bytes: gl.constexpr = plan.row_bytes
    numbers = words
    if plan.spans > 1:
        left, right = gl.split(words.reshape([rows, 2, row_bytes // 2]).permute((0, 2, 1)))
        numbers = left if span < plan.spans // 2 else right
    if plan.spans == 4:
        left, right = gl.split(numbers.reshape([rows, 2, row_bytes // 4]).permute((0, 2, 1)))
        numbers = left if span % 2 == 0 else right
    return gl.convert_layout(numbers, plan.span_layout) if plan.spans > 1 else numbers


@gluon.jit
def _unpack(words, zero, scale, plan: gl.constexpr):
    """The weights of a span [rows, bytes] in 16 bits, as the tensor cores' left operand [rows, columns]."""
    asm: gl.constexpr = plan.asm
    rows: gl.constexpr = plan.rows
    columns: gl.constexpr = plan.span_columns
    if plan.is_int4:
        if plan.has_zeros and plan.is_scaled:
            low, high = gl.inline_asm_elementwise(
                asm, "=r,=r,=r,=r,r,r,r,r,r", [words, zero, scale], (zero.dtype, zero.dtype), True, 4
            )
        elif plan.is_scaled:
            low, high = gl.inline_asm_elementwise(
                asm, "=r,=r,=r,=r,r,r,r", [words, scale], (zero.dtype, zero.dtype), True, 4
            )
        elif plan.has_zeros:
            low, high = gl.inline_asm_elementwise(
                asm, "=r,=r,=r,=r,r,r,r", [words, zero], (zero.dtype, zero.dtype), True, 4
            )
        else:
            low, high = gl.inline_asm_elementwise(asm, "=r,=r,=r,=r,r", [words], (zero.dtype, zero.dtype), True, 4)
        # chunk, thread, block's high bit, half, second, block's low bit: see fragments.py
        digits = gl.join(low, high).reshape([rows, columns // 64, 4, 2, 2, 2, 2]).permute((0, 1, 3, 6, 4, 2, 5))
    else:
        if plan.has_zeros:
            numbers = gl.inline_asm_elementwise(asm, "=r,=r,r,r,r", [words, zero], zero.dtype, True, 4)
        else:
            numbers = gl.inline_asm_elementwise(asm, "=r,=r,r", [words], zero.dtype, True, 4)
        # chunk, thread, block, half, second
        digits = numbers.reshape([rows, columns // 64, 4, 4, 2, 2]).permute((0, 1, 3, 4, 2, 5))
    return gl.convert_layout(digits.reshape([rows, columns]), gl.DotOperandLayout(0, plan.layout, 2))


@gluon.jit
def _product(weights, x_tile, total, plan: gl.constexpr):
    """`total` + `weights` [rows, columns] @ `x_tile` [columns, tokens]."""
    if plan.layout.version[0] == 2:
        total = mma_v2(weights, x_tile.load(gl.DotOperandLayout(1, plan.layout, 2)), total)
    else:
        total = hopper.warpgroup_mma(weights, x_tile, total)
    return total


@gluon.jit
def _multiply_unpacked(place, shared, of_groups, first: gl.constexpr, row_tile: gl.constexpr, plan: gl.constexpr):
    begin, steps = place
    w_shared, x_shared, full, empty = shared
    s_shared, z_shared, copied = of_groups
    dtype: gl.constexpr = x_shared.dtype
    parts: gl.constexpr = plan.parts
    spans: gl.constexpr = plan.spans
    spans_per_group: gl.constexpr = plan.spans_per_group
    rows: gl.constexpr = plan.rows
    columns: gl.constexpr = plan.columns
    layout: gl.constexpr = plan.layout
    span_bytes: gl.constexpr = plan.row_bytes // spans
    total = gl.zeros([rows, columns], gl.float32, layout)
    nothing = gl.zeros([rows, columns], gl.float32, layout)
    zero = gl.full([rows, span_bytes], 0, dtype, plan.span_layout)
    by_byte = zero
    # Spans of a tile that are surely of one group.
    spans_alike: gl.constexpr = spans if spans_per_group % spans == 0 else 1
    if spans_per_group > 0:
        if plan.row_tiles == 1:
            mbarrier.wait(copied, 0)
        first_group = begin * parts * spans // spans_per_group - row_tile * plan.max_groups
    # Else ptxas would find a path to the last wait on which something else sets the sums, and wait for each product.
    gl.assume(steps > first)
    for step in range(first, steps, plan.consumers):
        stage = step % plan.stages
        mbarrier.wait(full.index(stage), step // plan.stages & 1)
        for part in gl.static_range(parts):
            tile = stage * parts + part
            words = _tile_of(w_shared, tile * plan.row_tiles + row_tile, plan).load(plan.words_layout)
            for span in gl.static_range(spans):
                place_of_span = ((begin + step) * parts + part) * spans + span
                x_tile = x_shared.index(tile * spans + span).permute((1, 0))
                numbers = _span_of(words, span, plan)
                if spans_per_group > 0 and span % spans_alike == 0:
                    group = place_of_span // spans_per_group - first_group
                    if plan.has_zeros:
                        row_zero = z_shared.index(group).load(gl.SliceLayout(1, plan.span_layout)).to(gl.float32)
                        zero = (row_zero + plan.zero_offset).to(dtype)[:, None].broadcast_to([rows, span_bytes])
                    if plan.is_scaled:
                        row_scale = s_shared.index(group).load(gl.SliceLayout(1, plan.span_layout)).to(gl.float32)
                        by_byte = row_scale.to(dtype)[:, None].broadcast_to([rows, span_bytes])
                weights = _unpack(numbers, zero, by_byte, plan)
                if plan.is_ahead:
                    total = hopper.warpgroup_mma(weights, x_tile, total, is_async=True)
                    total = hopper.warpgroup_mma_wait(1, deps=(total,))
                    if part == 0 and span == 0:
                        # The last step's products have ended.
                        synchronize()
                        has_last = step > first
                        last = (step + plan.stages - plan.consumers) % plan.stages
                        mbarrier.arrive(empty.index(last), count=1, pred=has_last)
                elif spans_per_group > 0 and not plan.is_scaled:
                    scale = s_shared.index(group).load(gl.SliceLayout(1, layout)).to(gl.float32)
                    total += _product(weights, x_tile, nothing, plan) * scale[:, None]
                else:
                    total = _product(weights, x_tile, total, plan)
        if not plan.is_ahead:
            synchronize()
            mbarrier.arrive(empty.index(stage), count=1)
    if plan.is_ahead:
        total = hopper.warpgroup_mma_wait(0, deps=(total,))
    return total


@gluon.jit
def _multiply_direct(place, shared, first: gl.constexpr, row_tile: gl.constexpr, plan: gl.constexpr):
    """Where the tensor cores read both operands.

    Each step's products start before the last one's end. They add up in the tensor cores, which keep about 14 bits of a
    sum of fp8. So sums of 4096 products were off by 0.13 % on an H200 (in the Euclidean norm), of 11008 by 0.24 %;
    rounding the activations costs 2.6 %.
    """
    _, steps = place
    w_shared, x_shared, full, empty = shared
    parts: gl.constexpr = plan.parts
    rows: gl.constexpr = plan.rows
    columns: gl.constexpr = plan.columns
    layout: gl.constexpr = plan.layout
    total = gl.zeros([rows, columns], gl.float32, layout)
    gl.assume(steps > first)  # see _multiply_unpacked
    for step in range(first, steps, plan.consumers):
        stage = step % plan.stages
        mbarrier.wait(full.index(stage), step // plan.stages & 1)
        for part in gl.static_range(parts):
            tile = (stage * parts + part) * plan.row_tiles + row_tile
            weights = _tile_of(w_shared, tile, plan)
            x_tile = x_shared.index(stage * parts + part).permute((1, 0))
            total = hopper.warpgroup_mma(weights, x_tile, total, is_async=True)
        total = hopper.warpgroup_mma_wait(parts, deps=(total,))
        if step > first:
            synchronize()
            mbarrier.arrive(empty.index((step - plan.consumers) % plan.stages), count=1)
    return hopper.warpgroup_mma_wait(0, deps=(total,))


@gluon.jit
def _signed(words, plan: gl.constexpr):
    """The words of a span of int4 [rows, bytes] as int8, 16 times as large, in the order of PairedTokens' columns."""
    rows: gl.constexpr = plan.rows
    columns: gl.constexpr = plan.span_columns
    low, high = gl.inline_asm_elementwise(INTO_INT8, "=r,=r,r", [words], (gl.int8, gl.int8), True, 4)
    # chunk, thread, word, byte, half
    digits = gl.join(low, high).reshape([rows, columns // 64, 4, 2, 4, 2]).permute((0, 1, 3, 5, 2, 4))
    return gl.convert_layout(digits.reshape([rows, columns]), gl.DotOperandLayout(0, plan.layout, 4))


@gluon.jit
def _multiply_int8(place, shared, of_groups, first: gl.constexpr, plan: gl.constexpr):
    """For int4 and pairs of int8: the sums of spans are exact."""
    begin, steps = place
    w_shared, x_shared, full, empty = shared
    s_shared, _, copied = of_groups
    parts: gl.constexpr = plan.parts
    spans: gl.constexpr = plan.spans
    rows: gl.constexpr = plan.rows
    columns: gl.constexpr = plan.columns
    layout: gl.constexpr = plan.layout
    total = gl.zeros([rows, columns], gl.float32, layout)
    nothing = gl.zeros([rows, columns], gl.int32, layout)
    if plan.spans_per_group > 0:
        mbarrier.wait(copied, 0)
        first_group = begin * parts * spans // plan.spans_per_group
    for step in range(first, steps, plan.consumers):
        stage = step % plan.stages
        mbarrier.wait(full.index(stage), step // plan.stages & 1)
        for part in gl.static_range(parts):
            words = _tile_of(w_shared, stage * parts + part, plan).load(plan.words_layout)
            for span in gl.static_range(spans):
                x_tile = x_shared.index((stage * parts + part) * spans + span).permute((1, 0))
                weights = _signed(_span_of(words, span, plan), plan)
                if layout.version[0] == 2:
                    products = mma_v2(weights, x_tile.load(gl.DotOperandLayout(1, layout, 4)), nothing)
                else:
                    products = hopper.warpgroup_mma(weights, x_tile, nothing, use_acc=False)
                sums = products.to(gl.float32)
                if plan.spans_per_group > 0:
                    group = (((begin + step) * parts + part) * spans + span) // plan.spans_per_group - first_group
                    scale = s_shared.index(group).load(gl.SliceLayout(1, layout)).to(gl.float32)
                    sums *= scale[:, None]
                total += sums
        synchronize()
        mbarrier.arrive(empty.index(stage), count=1)
    return total


@gluon.jit
def multiply(place, shared, of_groups, first: gl.constexpr, row_tile: gl.constexpr, plan: gl.constexpr):
    """A consumer's sum of a tile of rows over the steps `first`, `first` + `consumers`, ...: [rows, columns of x]."""
    if plan.asm == "" and plan.is_int4:
        total = _multiply_int8(place, shared, of_groups, first, plan)
    elif plan.asm == "":
        total = _multiply_direct(place, shared, first, row_tile, plan)
    else:
        total = _multiply_unpacked(place, shared, of_groups, first, row_tile, plan)
    return total
