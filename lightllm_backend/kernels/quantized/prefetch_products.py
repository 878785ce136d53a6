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
def _tile_of(w_shared, tile, rows: gl.constexpr, row_bytes: gl.constexpr):
    """A tile of the weight: [rows, bytes]."""
    weights = w_shared.index(tile)
    if len(w_shared.shape) > 3:
        weights = weights.reshape([rows, row_bytes])
    return weights


@gluon.jit
def _span_of(words, span: gl.constexpr, spans: gl.constexpr, layout: gl.constexpr):
    """One of the 1, 2 or 4 spans of columns of `words` [rows, bytes], which are registers of the same threads."""
    rows: gl.constexpr = words.shape[0]
    numbers = words
    if spans > 1:
        left, right = gl.split(words.reshape([rows, 2, words.shape[1] // 2]).permute((0, 2, 1)))
        numbers = left if span < spans // 2 else right
    if spans == 4:
        left, right = gl.split(numbers.reshape([rows, 2, words.shape[1] // 4]).permute((0, 2, 1)))
        numbers = left if span % 2 == 0 else right
    return gl.convert_layout(numbers, layout) if spans > 1 else numbers


@gluon.jit
def _unpack(
    words,
    zero,
    scale,
    asm: gl.constexpr,
    is_int4: gl.constexpr,
    has_zeros: gl.constexpr,
    is_scaled: gl.constexpr,
    layout: gl.constexpr,
):
    """The weights of a tile [rows, bytes] in 16 bits, as the tensor cores' left operand [rows, columns]."""
    rows: gl.constexpr = words.shape[0]
    columns: gl.constexpr = words.shape[1] * (2 if is_int4 else 1)
    if is_int4:
        if has_zeros and is_scaled:
            low, high = gl.inline_asm_elementwise(
                asm, "=r,=r,=r,=r,r,r,r,r,r", [words, zero, scale], (zero.dtype, zero.dtype), True, 4
            )
        elif is_scaled:
            low, high = gl.inline_asm_elementwise(
                asm, "=r,=r,=r,=r,r,r,r", [words, scale], (zero.dtype, zero.dtype), True, 4
            )
        elif has_zeros:
            low, high = gl.inline_asm_elementwise(
                asm, "=r,=r,=r,=r,r,r,r", [words, zero], (zero.dtype, zero.dtype), True, 4
            )
        else:
            low, high = gl.inline_asm_elementwise(asm, "=r,=r,=r,=r,r", [words], (zero.dtype, zero.dtype), True, 4)
        # chunk, thread, block's high bit, half, second, block's low bit: see fragments.py
        digits = gl.join(low, high).reshape([rows, columns // 64, 4, 2, 2, 2, 2]).permute((0, 1, 3, 6, 4, 2, 5))
    else:
        if has_zeros:
            numbers = gl.inline_asm_elementwise(asm, "=r,=r,r,r,r", [words, zero], zero.dtype, True, 4)
        else:
            numbers = gl.inline_asm_elementwise(asm, "=r,=r,r", [words], zero.dtype, True, 4)
        # chunk, thread, block, half, second
        digits = numbers.reshape([rows, columns // 64, 4, 4, 2, 2]).permute((0, 1, 3, 4, 2, 5))
    return gl.convert_layout(digits.reshape([rows, columns]), gl.DotOperandLayout(0, layout, 2))


@gluon.jit
def _product(weights, x_tile, total, layout: gl.constexpr):
    """`total` + `weights` [rows, columns] @ `x_tile` [columns, tokens]."""
    if layout.version[0] == 2:
        total = mma_v2(weights, x_tile.load(gl.DotOperandLayout(1, layout, 2)), total)
    else:
        total = hopper.warpgroup_mma(weights, x_tile, total)
    return total


@gluon.jit
def _multiply_unpacked(
    place,
    shared,
    of_groups,
    first: gl.constexpr,
    consumers: gl.constexpr,
    stages: gl.constexpr,
    parts: gl.constexpr,
    spans: gl.constexpr,
    spans_per_group: gl.constexpr,
    is_ahead: gl.constexpr,
    is_scaled: gl.constexpr,
    is_int4: gl.constexpr,
    asm: gl.constexpr,
    zero_offset: gl.constexpr,
    row_tile: gl.constexpr,
    row_tiles: gl.constexpr,
    rows: gl.constexpr,
    row_bytes: gl.constexpr,
    words_layout: gl.constexpr,
    span_layout: gl.constexpr,
    layout: gl.constexpr,
):
    """The sum over the steps `first`, `first` + `consumers`, ...: [rows, tokens]."""
    begin, steps = place
    w_shared, x_shared, full, empty = shared
    s_shared, z_shared, copied = of_groups
    dtype: gl.constexpr = x_shared.dtype
    is_grouped: gl.constexpr = spans_per_group > 0
    has_zeros: gl.constexpr = z_shared.shape[0] > 1
    block_tokens: gl.constexpr = x_shared.shape[1]
    total = gl.zeros([rows, block_tokens], gl.float32, layout)
    nothing = gl.zeros([rows, block_tokens], gl.float32, layout)
    span_bytes: gl.constexpr = row_bytes // spans
    zero = gl.full([rows, span_bytes], 0, dtype, span_layout)
    by_byte = zero
    # Spans of a tile that are surely of one group.
    spans_alike: gl.constexpr = spans if spans_per_group % spans == 0 else 1
    if is_grouped:
        if row_tiles == 1:
            mbarrier.wait(copied, 0)
        first_group = begin * parts * spans // spans_per_group - row_tile * (s_shared.shape[0] // row_tiles)
    # Else ptxas would find a path to the last wait on which something else sets the sums, and wait for each product.
    gl.assume(steps > first)
    for step in range(first, steps, consumers):
        stage = step % stages
        mbarrier.wait(full.index(stage), step // stages & 1)
        for part in gl.static_range(parts):
            tile = stage * parts + part
            words = _tile_of(w_shared, tile * row_tiles + row_tile, rows, row_bytes).load(words_layout)
            for span in gl.static_range(spans):
                place_of_span = ((begin + step) * parts + part) * spans + span
                x_tile = x_shared.index(tile * spans + span).permute((1, 0))
                numbers = _span_of(words, span, spans, span_layout)
                if is_grouped and span % spans_alike == 0:
                    group = place_of_span // spans_per_group - first_group
                    if has_zeros:
                        row_zero = z_shared.index(group).load(gl.SliceLayout(1, span_layout)).to(gl.float32)
                        zero = (row_zero + zero_offset).to(dtype)[:, None].broadcast_to([rows, span_bytes])
                    if is_scaled:
                        row_scale = s_shared.index(group).load(gl.SliceLayout(1, span_layout)).to(gl.float32)
                        by_byte = row_scale.to(dtype)[:, None].broadcast_to([rows, span_bytes])
                weights = _unpack(numbers, zero, by_byte, asm, is_int4, has_zeros, is_scaled, layout)
                if is_ahead:
                    total = hopper.warpgroup_mma(weights, x_tile, total, is_async=True)
                    total = hopper.warpgroup_mma_wait(1, deps=(total,))
                    if part == 0 and span == 0:
                        # The last step's products have ended.
                        synchronize()
                        mbarrier.arrive(empty.index((step + stages - consumers) % stages), count=1, pred=step > first)
                elif is_grouped and not is_scaled:
                    scale = s_shared.index(group).load(gl.SliceLayout(1, layout)).to(gl.float32)
                    total += _product(weights, x_tile, nothing, layout) * scale[:, None]
                else:
                    total = _product(weights, x_tile, total, layout)
        if not is_ahead:
            synchronize()
            mbarrier.arrive(empty.index(stage), count=1)
    if is_ahead:
        total = hopper.warpgroup_mma_wait(0, deps=(total,))
    return total


@gluon.jit
def _multiply_direct(
    place,
    shared,
    first: gl.constexpr,
    consumers: gl.constexpr,
    stages: gl.constexpr,
    parts: gl.constexpr,
    row_tile: gl.constexpr,
    row_tiles: gl.constexpr,
    rows: gl.constexpr,
    row_bytes: gl.constexpr,
    layout: gl.constexpr,
):
    """As _multiply_unpacked, where the tensor cores read both operands.

    Each step's products start before the last one's end. They add up in the tensor cores, which keep about 14 bits of a
    sum of fp8. So sums of 4096 products were off by 0.13 % on an H200 (in the Euclidean norm), of 11008 by 0.24 %;
    rounding the activations costs 2.6 %.
    """
    _, steps = place
    w_shared, x_shared, full, empty = shared
    block_tokens: gl.constexpr = x_shared.shape[1]
    total = gl.zeros([rows, block_tokens], gl.float32, layout)
    gl.assume(steps > first)  # see _multiply_unpacked
    for step in range(first, steps, consumers):
        stage = step % stages
        mbarrier.wait(full.index(stage), step // stages & 1)
        for part in gl.static_range(parts):
            tile = (stage * parts + part) * row_tiles + row_tile
            weights = _tile_of(w_shared, tile, rows, row_bytes)
            x_tile = x_shared.index(stage * parts + part).permute((1, 0))
            total = hopper.warpgroup_mma(weights, x_tile, total, is_async=True)
        total = hopper.warpgroup_mma_wait(parts, deps=(total,))
        if step > first:
            synchronize()
            mbarrier.arrive(empty.index((step - consumers) % stages), count=1)
    return hopper.warpgroup_mma_wait(0, deps=(total,))


@gluon.jit
def _signed(words, layout: gl.constexpr):
    """The words of a tile of int4 [rows, bytes] as int8, 16 times as large, in the order of PairedTokens' columns."""
    rows: gl.constexpr = words.shape[0]
    columns: gl.constexpr = words.shape[1] * 2
    low, high = gl.inline_asm_elementwise(INTO_INT8, "=r,=r,r", [words], (gl.int8, gl.int8), True, 4)
    # chunk, thread, word, byte, half
    digits = gl.join(low, high).reshape([rows, columns // 64, 4, 2, 4, 2]).permute((0, 1, 3, 5, 2, 4))
    return gl.convert_layout(digits.reshape([rows, columns]), gl.DotOperandLayout(0, layout, 4))


@gluon.jit
def _multiply_int8(
    place,
    shared,
    of_groups,
    first: gl.constexpr,
    consumers: gl.constexpr,
    stages: gl.constexpr,
    parts: gl.constexpr,
    spans: gl.constexpr,
    spans_per_group: gl.constexpr,
    rows: gl.constexpr,
    row_bytes: gl.constexpr,
    words_layout: gl.constexpr,
    span_layout: gl.constexpr,
    layout: gl.constexpr,
):
    """As _multiply_unpacked, for int4 and pairs of int8: the sums of spans are exact."""
    begin, steps = place
    w_shared, x_shared, full, empty = shared
    s_shared, _, copied = of_groups
    columns_of_x: gl.constexpr = x_shared.shape[1]
    total = gl.zeros([rows, columns_of_x], gl.float32, layout)
    nothing = gl.zeros([rows, columns_of_x], gl.int32, layout)
    if spans_per_group > 0:
        mbarrier.wait(copied, 0)
        first_group = begin * parts * spans // spans_per_group
    for step in range(first, steps, consumers):
        stage = step % stages
        mbarrier.wait(full.index(stage), step // stages & 1)
        for part in gl.static_range(parts):
            words = _tile_of(w_shared, stage * parts + part, rows, row_bytes).load(words_layout)
            for span in gl.static_range(spans):
                x_tile = x_shared.index((stage * parts + part) * spans + span).permute((1, 0))
                weights = _signed(_span_of(words, span, spans, span_layout), layout)
                if layout.version[0] == 2:
                    products = mma_v2(weights, x_tile.load(gl.DotOperandLayout(1, layout, 4)), nothing)
                else:
                    products = hopper.warpgroup_mma(weights, x_tile, nothing, use_acc=False)
                sums = products.to(gl.float32)
                if spans_per_group > 0:
                    group = (((begin + step) * parts + part) * spans + span) // spans_per_group - first_group
                    scale = s_shared.index(group).load(gl.SliceLayout(1, layout)).to(gl.float32)
                    sums *= scale[:, None]
                total += sums
        synchronize()
        mbarrier.arrive(empty.index(stage), count=1)
    return total


@gluon.jit
def multiply(
    place,
    shared,
    of_groups,
    first: gl.constexpr,
    consumers: gl.constexpr,
    stages: gl.constexpr,
    parts: gl.constexpr,
    spans: gl.constexpr,
    spans_per_group: gl.constexpr,
    is_ahead: gl.constexpr,
    is_scaled: gl.constexpr,
    is_int4: gl.constexpr,
    asm: gl.constexpr,
    zero_offset: gl.constexpr,
    row_tile: gl.constexpr,
    row_tiles: gl.constexpr,
    rows: gl.constexpr,
    row_bytes: gl.constexpr,
    words_layout: gl.constexpr,
    span_layout: gl.constexpr,
    layout: gl.constexpr,
):
    """A consumer's sum, over the steps `first`, `first` + `consumers`, ...: [rows, columns of activations]."""
    if asm == "" and is_int4:
        total = _multiply_int8(
            place, shared, of_groups, first, consumers, stages, parts, spans, spans_per_group, rows, row_bytes,
            words_layout, span_layout, layout,
        )  # fmt: skip
    elif asm == "":
        total = _multiply_direct(
            place, shared, first, consumers, stages, parts, row_tile, row_tiles, rows, row_bytes, layout
        )
    else:
        total = _multiply_unpacked(
            place, shared, of_groups, first, consumers, stages, parts, spans, spans_per_group, is_ahead, is_scaled,
            is_int4, asm, zero_offset, row_tile, row_tiles, rows, row_bytes, words_layout, span_layout, layout,
        )  # fmt: skip
    return total
