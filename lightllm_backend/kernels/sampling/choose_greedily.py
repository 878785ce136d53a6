# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Greedy choice of each sequence's next token, also written to the table from which the next step reads it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightllm_backend.kernels.dependent_launch import dependent_launch, wait_for_previous
from lightllm_backend.kernels.sampling.apply_token_masks import check_masks
from lightllm_backend.kernels.sizes import next_power_of_2

_BLOCK = 16384
_MASKED_BLOCK, _TOGETHER = 8192, 4


@triton.jit
def _load(row, start, vocab_size: tl.constexpr, block: tl.constexpr):
    """A block of logits, and their columns."""
    column = start + tl.arange(0, block)
    return tl.load(row + column, mask=column < vocab_size, other=float("-inf")).to(tl.float32), column


@triton.jit
def choose_greedily_kernel(
    logits,
    places,
    table,
    tokens,
    masks,
    mask_rows,
    logits_stride,
    vocab_size: tl.constexpr,
    has_masks: tl.constexpr,
    is_dependent: tl.constexpr,
    block: tl.constexpr,
    together: tl.constexpr,
):
    """Handles one sequence. `vocab_size` is a constant so that all loads of the row are issued before any is used."""
    sequence = tl.program_id(0).to(tl.int64)
    row = logits + sequence * logits_stride
    place = tl.load(places + sequence)
    wait_for_previous(is_dependent)
    greatest = tl.full([block], float("-inf"), dtype=tl.float32)
    token = tl.zeros([block], dtype=tl.int32)
    if has_masks:
        mask_row = tl.load(mask_rows + sequence)
        num_words = tl.cdiv(vocab_size, 32)
        mask = masks + mask_row.to(tl.int64) * num_words
        num_words = tl.where(mask_row >= 0, num_words, 0)
        # All loads of the row and its mask at once would take more registers than there are.
        for begin in range(0, vocab_size, together * block):
            for part in tl.static_range(0, together * block, block):
                start = begin + part
                logit, column = _load(row, start, vocab_size, block)
                # With fewer words than threads, each thread loads the words of its own logits.
                word = start // 32 + tl.arange(0, block // 32)
                bits = tl.load(mask + word, mask=word < num_words, other=-1)
                bits = tl.reshape((bits[:, None] >> tl.arange(0, 32)[None, :]) & 1, [block])
                logit = tl.where(bits != 0, logit, float("-inf"))
                token = tl.where(logit > greatest, column, token)
                greatest = tl.maximum(greatest, logit, propagate_nan=tl.PropagateNan.ALL)
    else:
        for start in tl.static_range(0, vocab_size, block):
            logit, column = _load(row, start, vocab_size, block)
            token = tl.where(logit > greatest, column, token)
            greatest = tl.maximum(greatest, logit, propagate_nan=tl.PropagateNan.ALL)
    maximum = tl.max(greatest, 0)
    token = tl.where(greatest == maximum, token, vocab_size)
    chosen = tl.min(tl.where(greatest != greatest, -1, token), 0)
    chosen = tl.where(tl.abs(maximum) < float("inf"), chosen, -1)
    tl.store(tokens + sequence, chosen)
    tl.store(table + place, tl.maximum(chosen, 0))


def choose_greedily(
    logits: Tensor, places: Tensor, table: Tensor, masks: Tensor | None = None, mask_rows: Tensor | None = None
) -> Tensor:
    sequences, vocab_size = logits.shape
    assert logits.stride(1) == 1
    assert places.is_contiguous()
    assert table.is_contiguous()
    assert (masks is None) == (mask_rows is None)
    if masks is not None and mask_rows is not None:
        check_masks(logits, masks, mask_rows)
    tokens = torch.empty(sequences, dtype=torch.int32, device=logits.device)
    if sequences == 0:
        return tokens
    largest = _BLOCK if masks is None else _MASKED_BLOCK
    block = max(32, min(largest, next_power_of_2(vocab_size)))
    choose_greedily_kernel[(sequences,)](
        logits,
        places,
        table,
        tokens,
        masks,
        mask_rows,
        logits.stride(0),
        vocab_size=vocab_size,
        has_masks=masks is not None,
        block=block,
        together=_TOGETHER,
        num_warps=16 if block == largest else 4,
        **dependent_launch(logits.device),
    )
    return tokens
