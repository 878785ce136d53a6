# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Copies logits in float32, without the tokens that a sequence may not generate next."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightllm_backend.kernels.sizes import cdiv

_BLOCK = 4096


@triton.jit
def apply_token_masks_kernel(
    logits, masks, mask_rows, out, logits_stride, out_stride, words, vocab_size, block: tl.constexpr
):
    """Handles one block of a sequence's logits."""
    sequence = tl.program_id(0).to(tl.int64)
    mask_row = tl.load(mask_rows + sequence)
    column = tl.program_id(1) * block + tl.arange(0, block)
    # With fewer words than threads, each thread loads the words of its own logits.
    word = tl.program_id(1) * (block // 32) + tl.arange(0, block // 32)
    num_words = tl.where(mask_row >= 0, words, 0)
    bits = tl.load(masks + mask_row.to(tl.int64) * words + word, mask=word < num_words, other=-1)
    live = column < vocab_size
    is_allowed = tl.reshape((bits[:, None] >> tl.arange(0, 32)[None, :]) & 1, [block]) != 0
    value = tl.load(logits + sequence * logits_stride + column, mask=live, other=0.0).to(tl.float32)
    tl.store(out + sequence * out_stride + column, tl.where(is_allowed, value, float("-inf")), mask=live)


def check_masks(logits: Tensor, masks: Tensor, mask_rows: Tensor) -> None:
    """Assert that these are masks of these logits."""
    sequences, vocab_size = logits.shape
    assert masks.dtype == mask_rows.dtype == torch.int32
    assert masks.is_contiguous()
    assert masks.shape[1] == cdiv(vocab_size, 32)
    assert mask_rows.shape == (sequences,)


def apply_token_masks(logits: Tensor, masks: Tensor, mask_rows: Tensor, out: Tensor) -> None:
    sequences, vocab_size = logits.shape
    check_masks(logits, masks, mask_rows)
    assert out.shape == logits.shape
    assert out.dtype == torch.float32
    assert logits.stride(1) == out.stride(1) == 1
    if sequences == 0:
        return
    grid = (sequences, cdiv(vocab_size, _BLOCK))
    apply_token_masks_kernel[grid](
        logits,
        masks,
        mask_rows,
        out,
        logits.stride(0),
        out.stride(0),
        masks.shape[1],
        vocab_size,
        block=_BLOCK,
        num_warps=8,
    )
