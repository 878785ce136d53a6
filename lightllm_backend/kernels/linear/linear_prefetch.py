# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Small-batch products for Hopper, in Gluon, that prefetch weights while the previous kernel drains.

Weights depend on no kernel. So the producer of a program, a single warp, first fills shared memory with the first
columns of its weights, only then waits for the previous kernel, and goes on with the tokens that it wrote. Thus memory
stays busy between two products, while a norm runs or the parts of attention are merged. Four or eight consumer warps
multiply.

Used for the shapes of linear_prefetch.json, mainly at 17 to 64 tokens. With more tokens, x, which each program reads
again, is as many bytes as the weights.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from lightllm_backend.kernels.dependent_launch import dependent_launch
from lightllm_backend.kernels.gluon import activated, copy_tile, synchronize, tile_descriptor
from lightllm_backend.kernels.linear.choice import LinearBlocks, padded_tokens

# Registers of a multiprocessor, of each producer thread, and at most of each other thread.
MULTIPROCESSOR_REGISTERS, PRODUCER_REGISTERS, MAX_REGISTERS = 65536, 24, 168


@gluon.jit
def _copy_weights(weight_tiles, w_shared, full, stage, row, column, features, is_gated: gl.constexpr):
    if is_gated:
        half: gl.constexpr = w_shared.shape[1] // 2
        tile = w_shared.index(stage)
        copy_tile(weight_tiles, [row, column], full.index(stage), tile.slice(0, half, dim=0))
        copy_tile(weight_tiles, [features + row, column], full.index(stage), tile.slice(half, half, dim=0))
    else:
        copy_tile(weight_tiles, [row, column], full.index(stage), w_shared.index(stage))


@gluon.jit
def _produce(
    x_tiles,
    weight_tiles,
    row,
    first,
    steps,
    features,
    shared,
    stages: gl.constexpr,
    is_gated: gl.constexpr,
    is_dependent: gl.constexpr,
):
    w_shared, x_shared, full, empty = shared
    inner: gl.constexpr = w_shared.shape[2]
    bytes_of_stage: gl.constexpr = (w_shared.shape[1] + x_shared.shape[1]) * inner * 2
    ahead = gl.minimum(steps, stages)
    for step in range(ahead):
        mbarrier.expect(full.index(step), bytes_of_stage)
        _copy_weights(weight_tiles, w_shared, full, step, row, first + step * inner, features, is_gated)
    if is_dependent:  # see dependent_launch
        gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
        gl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
        )
    for step in range(ahead):
        copy_tile(x_tiles, [0, first + step * inner], full.index(step), x_shared.index(step))
    for step in range(ahead, steps):
        stage = step % stages
        mbarrier.wait(empty.index(stage), (step // stages & 1) ^ 1)
        mbarrier.expect(full.index(stage), bytes_of_stage)
        _copy_weights(weight_tiles, w_shared, full, stage, row, first + step * inner, features, is_gated)
        copy_tile(x_tiles, [0, first + step * inner], full.index(stage), x_shared.index(stage))


@gluon.jit
def _consume(
    result,
    steps,
    shared,
    stages: gl.constexpr,
    is_gated: gl.constexpr,
    is_gelu: gl.constexpr,
    has_bias: gl.constexpr,
    num_warps: gl.constexpr,
):
    bias, out, row, split, tokens, features = result
    w_shared, x_shared, full, empty = shared
    rows: gl.constexpr = w_shared.shape[1]
    block_tokens: gl.constexpr = x_shared.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, block_tokens, 16])
    total = gl.zeros([rows, block_tokens], gl.float32, layout)
    for step in range(steps):
        stage = step % stages
        mbarrier.wait(full.index(stage), step // stages & 1)
        total = hopper.warpgroup_mma(w_shared.index(stage), x_shared.index(stage).permute((1, 0)), total, is_async=True)
        total = hopper.warpgroup_mma_wait(0, deps=(total,))
        synchronize()
        mbarrier.arrive(empty.index(stage), count=1)
    width: gl.constexpr = rows // 2 if is_gated else rows
    if has_bias:
        index = gl.arange(0, rows, layout=gl.SliceLayout(1, layout))
        feature = row + index % width
        added = gl.load(bias + feature + index // width * features, mask=feature < features, other=0.0)
        total += gl.where(split == 0, added.to(gl.float32), 0.0)[:, None]
    if is_gated:
        pairs: gl.constexpr = gl.BlockedLayout([4, 1, 2], [8, 4, 1], [1, num_warps, 1], [2, 0, 1])
        gate, up = gl.split(gl.convert_layout(total.reshape([2, width, block_tokens]).permute((1, 2, 0)), pairs))
        total = activated(gate, is_gelu) * up
    store_layout: gl.constexpr = gl.BlockedLayout([4, 1], [8, 4], [1, num_warps], [0, 1])
    total = gl.convert_layout(total.to(out.dtype.element_ty), store_layout)
    feature = row + gl.arange(0, width, layout=gl.SliceLayout(1, store_layout))
    token = gl.arange(0, block_tokens, layout=gl.SliceLayout(0, store_layout))
    address = out + (split * tokens + token)[None, :] * features + feature[:, None]
    gl.store(address, total, mask=(token < tokens)[None, :] & (feature < features)[:, None])


@gluon.jit(do_not_specialize=["tokens", "steps"])
def linear_prefetch_kernel(
    x_tiles,
    weight_tiles,
    bias,
    out,
    tokens,
    features,
    steps,
    has_bias: gl.constexpr,
    is_gated: gl.constexpr,
    is_gelu: gl.constexpr,
    is_dependent: gl.constexpr,
    block_tokens: gl.constexpr,
    block_out: gl.constexpr,
    block_inner: gl.constexpr,
    stages: gl.constexpr,
    consumer_warps: gl.constexpr,
    producer_registers: gl.constexpr,
):
    """Computes a block of features for all tokens, over one split of the inner dimension. As in linear_splits, the
    weight is the left operand; if gated, half of its rows belong to the gate, half to `up`."""
    dtype: gl.constexpr = weight_tiles.dtype
    w_shared = gl.allocate_shared_memory(dtype, [stages, block_out, block_inner], weight_tiles.layout)
    x_shared = gl.allocate_shared_memory(dtype, [stages, block_tokens, block_inner], x_tiles.layout)
    full = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(stages):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    fence_async_shared()
    synchronize()
    row = gl.program_id(0) * (block_out // 2 if is_gated else block_out)
    split = gl.program_id(1)
    first = split * steps * block_inner
    shared = (w_shared, x_shared, full, empty)
    result = (bias, out, row, split, tokens, features)
    gl.warp_specialize(
        [
            (_consume, (result, steps, shared, stages, is_gated, is_gelu, has_bias, consumer_warps)),
            (_produce, (x_tiles, weight_tiles, row, first, steps, features, shared, stages, is_gated, is_dependent)),
        ],
        [1],
        [producer_registers],
    )


def launch_prefetch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    blocks: LinearBlocks,
    is_gated: bool,
    is_gelu: bool = False,
) -> None:
    """Write the product's parts to `out` [splits, tokens, features]: float32, or of x's type if there is one split.

    `weight` is [features, in_features], if gated [2 * features, in_features], which allows one split only.
    """
    tokens, in_features = x.shape
    features = out.shape[-1]
    block_tokens = padded_tokens(tokens)
    rows = blocks.out // 2 if is_gated else blocks.out
    assert weight.is_contiguous()
    assert out.is_contiguous()
    assert weight.shape == (features * (2 if is_gated else 1), in_features)
    assert in_features % (blocks.splits * blocks.inner) == 0
    assert blocks.splits == 1 or not is_gated
    linear_prefetch_kernel[(-(-features // rows), blocks.splits)](
        tile_descriptor(x, x.shape, (block_tokens, blocks.inner)),
        tile_descriptor(weight, weight.shape, (rows, blocks.inner)),
        x if bias is None else bias,
        out,
        tokens,
        features,
        in_features // (blocks.splits * blocks.inner),
        has_bias=bias is not None,
        is_gated=is_gated,
        is_gelu=is_gelu,
        block_tokens=block_tokens,
        block_out=blocks.out,
        block_inner=blocks.inner,
        stages=blocks.num_stages,
        consumer_warps=blocks.num_warps,
        producer_registers=PRODUCER_REGISTERS,
        num_warps=blocks.num_warps,
        maxnreg=registers_of(blocks),
        **dependent_launch(x.device),
    )


def registers_of(blocks: LinearBlocks) -> int:
    """Registers per thread that let the planned programs share a multiprocessor; the producer's warp counts as four."""
    threads = 32 * (blocks.num_warps + 4) * blocks.programs_per_sm
    return min(MAX_REGISTERS, MULTIPROCESSOR_REGISTERS // threads // 8 * 8)
