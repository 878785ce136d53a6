# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""How decode attention splits a context into parts, and the kernel that merges them (split-KV)."""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightllm_backend.kernels.dependent_launch import dependent_launch, start_next, wait_for_previous
from lightllm_backend.kernels.sizes import next_power_of_2

# Softmax is computed in powers of two.
LOG2_E = tl.constexpr(math.log2(math.e))

# Longer than any context.
NO_WINDOW = 2**31 - 1

# Shorter splits cost more in merging than they gain.
_MIN_SPLIT_TOKENS = 64
_MAX_SPLITS = 64
# Enough to keep a multiprocessor's loads in flight (measured on an H100 and an H200).
_WARPS_PER_MULTIPROCESSOR = 8
# The parts that a program loads before it waits for any of them.
_MERGED_AT_ONCE = 32


class TokenBlocks(NamedTuple):
    """The tile in which a program of decode attention reads its part of the context."""

    tokens: int
    num_warps: int
    num_stages: int
    starts_early: bool = True  # by dependent launch


def split_count(programs: int, max_context_length: int, multiprocessors: int, num_warps: int) -> int:
    """The number of parts per context with which `programs` (sequences times KV heads) fill the GPU with warps."""
    wanted = _WARPS_PER_MULTIPROCESSOR * multiprocessors // (max(1, programs) * num_warps)
    longest = -(-max_context_length // _MIN_SPLIT_TOKENS)
    return max(1, min(wanted, longest, _MAX_SPLITS))


def split_buffers(out: Tensor, splits: int) -> tuple[Tensor, Tensor]:
    """Buffers for `partial` and `log_sums` of merge_splits; with one split, which writes `out` itself, any tensor."""
    if splits == 1:
        return out, out
    sequences, heads, head_dim = out.shape
    partial = torch.empty((sequences, heads, splits, head_dim), dtype=torch.float32, device=out.device)
    return partial, torch.empty((sequences, heads, splits), dtype=torch.float32, device=out.device)


@triton.jit
def soft_capped(score, soft_cap: tl.constexpr):
    """The exponents of 2 that scores become if they are kept within `soft_cap` by tanh; 0: as they are."""
    if soft_cap > 0:
        most: tl.constexpr = soft_cap * LOG2_E
        # tanh(y) = 1 - 2 / (1 + e^(2 y))
        score = most - 2.0 * most / (1.0 + tl.exp2(score * (2.0 / soft_cap)))
    return score


@triton.jit
def _part_length(seen, splits, block_tokens: tl.constexpr):
    """The tokens of each part but the last: whole blocks."""
    return tl.cdiv(tl.cdiv(seen, block_tokens), splits) * block_tokens


@triton.jit
def split_range(context, window, split, splits, block_tokens: tl.constexpr):
    """The first token of a part, and the one behind its last; parts divide what the window shows. The last parts may be
    empty."""
    seen = tl.minimum(context, window)
    length = _part_length(seen, splits, block_tokens)
    start = context - seen + split * length
    return start, tl.minimum(context, start + length)


@triton.jit(do_not_specialize=["splits"])
def merge_splits_kernel(
    partial,
    log_sums,
    context_lengths,
    out,
    window,
    splits,
    head_dim: tl.constexpr,
    is_dependent: tl.constexpr,
    block_tokens: tl.constexpr,
    block_splits: tl.constexpr,
    block_dim: tl.constexpr,
):
    """Merges one head of one sequence."""
    start_next(is_dependent)
    sequence = tl.program_id(1)
    row = sequence.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    column = tl.arange(0, block_dim)
    # Lengths came from the host before the step's first kernel, so they may be read before the wait.
    seen = tl.minimum(tl.load(context_lengths + sequence), window)
    used = tl.cdiv(seen, tl.maximum(_part_length(seen, splits, block_tokens), 1))
    wait_for_previous(is_dependent)
    maximum = tl.full([1], float("-inf"), dtype=tl.float32)
    total = tl.zeros([1], dtype=tl.float32)
    result = tl.zeros([block_dim], dtype=tl.float32)
    for first in range(0, used, block_splits):
        split = first + tl.arange(0, block_splits)
        live = (split < used)[:, None] & (column < head_dim)[None, :]
        # Neither load waits for the other.
        log_sum = tl.load(log_sums + row * splits + split, mask=split < used, other=float("-inf"))
        value = tl.load(partial + (row * splits + split)[:, None] * head_dim + column[None, :], mask=live, other=0.0)
        new_maximum = tl.maximum(maximum, tl.max(log_sum, 0))
        weight = tl.exp2(log_sum - new_maximum)
        correction = tl.exp2(maximum - new_maximum)
        total = total * correction + tl.sum(weight, 0)
        result = result * correction + tl.sum(weight[:, None] * value, 0)
        maximum = new_maximum
    result /= tl.where(used > 0, total, 1.0)
    written = column < tl.where(used > 0, head_dim, 0)
    tl.store(out + row * head_dim + column, result.to(out.dtype.element_ty), mask=written)


def merge_splits(
    partial: Tensor, log_sums: Tensor, context_lengths: Tensor, window: int, block_tokens: int, out: Tensor
) -> Tensor:
    sequences, heads, splits, head_dim = partial.shape
    assert partial.is_contiguous()
    assert log_sums.is_contiguous()
    assert out.is_contiguous()
    if sequences == 0:
        return out
    merge_splits_kernel[(heads, sequences)](
        partial,
        log_sums,
        context_lengths,
        out,
        window or NO_WINDOW,
        splits,
        head_dim=head_dim,
        block_tokens=block_tokens,
        block_splits=min(_MERGED_AT_ONCE, next_power_of_2(splits)),
        block_dim=next_power_of_2(head_dim),
        num_warps=1,
        **dependent_launch(out.device),
    )
    return out
