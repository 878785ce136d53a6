# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Into which parts decode attention cuts a context, and how they are joined again."""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightllm_backend.kernels.dependent_launch import dependent_launch, wait_for_previous

# Softmax is computed in powers of two.
LOG2_E = tl.constexpr(math.log2(math.e))

# Longer than any context.
NO_WINDOW = 2**31 - 1

# A split shorter than this costs more in merging than it gains.
_MIN_SPLIT_TOKENS = 64
_MAX_SPLITS = 64
# Programs that keep one multiprocessor's loads in flight.
_PROGRAMS_PER_MULTIPROCESSOR = 8

# KV heads of all sequences, each of which is at least one program: from MANY_HEADS on they fill a large GPU many times
# over, and below FEW_HEADS each context is cut into parts.
FEW_HEADS, MANY_HEADS = 512, 2048


class TokenBlocks(NamedTuple):
    """How a program of decode attention goes through its part."""

    tokens: int
    num_warps: int
    num_stages: int


def split_count(programs: int, max_context_length: int, multiprocessors: int) -> int:
    """How many parts each context is cut into, so that `programs` times as many occupy the GPU."""
    wanted = _PROGRAMS_PER_MULTIPROCESSOR * multiprocessors // max(1, programs)
    longest = -(-max_context_length // _MIN_SPLIT_TOKENS)
    return max(1, min(wanted, longest, _MAX_SPLITS))


def split_buffers(out: Tensor, splits: int) -> tuple[Tensor, Tensor]:
    """Where the parts of `out` [sequences, heads, head_dim] go; with one split any tensor does."""
    if splits == 1:
        return out, out
    sequences, heads, head_dim = out.shape
    partial = torch.empty((sequences, heads, splits, head_dim), dtype=torch.float32, device=out.device)
    return partial, torch.empty((sequences, heads, splits), dtype=torch.float32, device=out.device)


@triton.jit
def split_range(context, window, split, splits, block_tokens: tl.constexpr):
    """The tokens of one part, from the first to behind the last: whole blocks, counted from what the window shows."""
    seen_from = tl.maximum(context - window, 0)
    length = tl.cdiv(tl.cdiv(context - seen_from, block_tokens), splits) * block_tokens
    start = seen_from + split * length
    return start, tl.minimum(context, start + length)


@triton.jit(do_not_specialize=["splits"])
def merge_splits_kernel(
    partial,
    log_sums,
    out,
    splits,
    head_dim: tl.constexpr,
    is_dependent: tl.constexpr,
    block_splits: tl.constexpr,
    block_dim: tl.constexpr,
):
    """One head of one sequence."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, block_splits)
    column = tl.arange(0, block_dim)
    wait_for_previous(is_dependent)
    log_sum = tl.load(log_sums + row * splits + split, mask=split < splits, other=float("-inf"))
    # Where all parts are empty, any finite number leaves their weights 0.
    maximum = tl.maximum(tl.max(log_sum, 0), -3.0e38)
    weight = tl.exp2(log_sum - maximum)
    # The values of an empty part are not read.
    live = (weight > 0)[:, None] & (column < head_dim)[None, :]
    value = tl.load(partial + (row * splits + split)[:, None] * head_dim + column[None, :], mask=live, other=0.0)
    total = tl.sum(weight, 0)
    result = tl.sum(weight[:, None] * value, 0) / tl.where(total > 0, total, 1.0)
    written = column < tl.where(total > 0, head_dim, 0)
    tl.store(out + row * head_dim + column, result.to(out.dtype.element_ty), mask=written)


def merge_splits(partial: Tensor, log_sums: Tensor, out: Tensor) -> Tensor:
    sequences, heads, splits, head_dim = partial.shape
    assert partial.is_contiguous()
    assert log_sums.is_contiguous()
    assert out.is_contiguous()
    if sequences == 0:
        return out
    merge_splits_kernel[(sequences * heads,)](
        partial,
        log_sums,
        out,
        splits,
        head_dim=head_dim,
        block_splits=triton.next_power_of_2(splits),
        block_dim=triton.next_power_of_2(head_dim),
        num_warps=2,
        **dependent_launch(out.device),
    )
    return out
