# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Both products of a gated feed-forward layer and the activation, for so many tokens that arithmetic bounds the time.

cuBLAS multiplies as fast, but writes the products, which the activation must read again. Here each multiprocessor runs
one program, which computes tile after tile. Triton-lang flattens the loops over tiles and over the inner dimension into
one, so operands of the next tile are copied while the result of one is computed and written.
"""

import triton
import triton.language as tl
from torch import Tensor

from lightllm_backend.kernels.activation.gate import activated
from lightllm_backend.kernels.dependent_launch import dependent_launch, wait_for_previous
from lightllm_backend.kernels.hardware import TensorDescriptor, has_ptx, multiprocessor_count
from lightllm_backend.kernels.sizes import cdiv

# A tile: tokens, features of the result, columns of the weight. Shared memory of Hopper has room for the operands of
# four steps and one result.
_TOKENS, _FEATURES, _INNER, _STAGES, _WARPS = 128, 128, 64, 4, 8
# Tiles of tokens whose x stays in the L2 cache while all weights pass by.
_GROUP = 16


@triton.jit
def _place(index, token_tiles, feature_tiles, group: tl.constexpr):
    """The row and column of tile `index`: within a group of token tiles, the token tiles come first."""
    of_group = group * feature_tiles
    first = index // of_group * group
    size = tl.minimum(token_tiles - first, group)
    within = index % of_group
    return first + within % size, within // size


@triton.jit(do_not_specialize=["steps", "token_tiles", "feature_tiles"])
def gated_tiles_kernel(
    x_tiles,
    weight_tiles,
    out_tiles,
    steps,
    token_tiles,
    feature_tiles,
    is_gelu: tl.constexpr,
    is_ptx: tl.constexpr,
    is_dependent: tl.constexpr,
    block_tokens: tl.constexpr,
    block_features: tl.constexpr,
    block_inner: tl.constexpr,
    group: tl.constexpr,
    stages: tl.constexpr,
):
    """Computes one tile after the other; half of its weight rows belong to the gate, half to `up`."""
    tl.assume(steps > 0)  # see linear_tiles
    wait_for_previous(is_dependent)
    done = tl.program_id(0)
    for tile in tl.range(
        tl.program_id(0), token_tiles * feature_tiles, tl.num_programs(0), num_stages=stages, flatten=True
    ):
        token_tile, feature_tile = _place(tile, token_tiles, feature_tiles, group)
        total = tl.zeros([block_tokens, 2 * block_features], dtype=tl.float32)
        for step in tl.range(steps, num_stages=stages):
            weight = weight_tiles.load([0, feature_tile * block_features, step * block_inner])
            weight = weight.reshape(2 * block_features, block_inner)
            total = tl.dot(x_tiles.load([token_tile * block_tokens, step * block_inner]), weight.T, total)
        gate, up = tl.split(total.reshape(block_tokens, 2, block_features).permute(0, 2, 1))
        result = activated(gate, is_gelu, is_ptx) * up
        # Compute the place again, so that the loop need not keep it in registers.
        token_tile, feature_tile = _place(done, token_tiles, feature_tiles, group)
        done += tl.num_programs(0)
        out_tiles.store([token_tile * block_tokens, feature_tile * block_features], result.to(out_tiles.dtype))


def gated_tiles(x: Tensor, weight: Tensor, is_gelu: bool = False) -> Tensor:
    tokens, in_features = x.shape
    features = weight.shape[0] // 2
    assert weight.is_contiguous()
    out = x.new_empty(tokens, features)
    token_tiles, feature_tiles = cdiv(tokens, _TOKENS), cdiv(features, _FEATURES)
    gated_tiles_kernel[(min(token_tiles * feature_tiles, multiprocessor_count(x.device)),)](
        TensorDescriptor(x, [tokens, in_features], [x.stride(0), 1], [_TOKENS, _INNER]),
        TensorDescriptor(
            weight, [2, features, in_features], [features * in_features, in_features, 1], [2, _FEATURES, _INNER]
        ),
        TensorDescriptor(out, [tokens, features], [features, 1], [_TOKENS, _FEATURES]),
        cdiv(in_features, _INNER),
        token_tiles,
        feature_tiles,
        is_gelu=is_gelu,
        is_ptx=has_ptx(x.device),
        block_tokens=_TOKENS,
        block_features=_FEATURES,
        block_inner=_INNER,
        group=_GROUP,
        stages=_STAGES,
        num_warps=_WARPS,
        num_stages=_STAGES,
        **dependent_launch(x.device),
    )
    return out
