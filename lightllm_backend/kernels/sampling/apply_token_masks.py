# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Rules out the tokens that a sequence may not generate next. Logits are only written, never read."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


@triton.jit
def apply_token_masks_kernel(logits, masks, mask_rows, logits_stride, words, vocab_size, block: tl.constexpr):
    """Handles one block of a sequence's logits."""
    sequence = tl.program_id(0).to(tl.int64)
    mask_row = tl.load(mask_rows + sequence)
    if mask_row >= 0:
        column = tl.program_id(1) * block + tl.arange(0, block)
        live = column < vocab_size
        word = tl.load(masks + mask_row.to(tl.int64) * words + column // 32, mask=live, other=-1)
        ruled_out = ((word >> (column % 32)) & 1) == 0
        value = tl.full([block], float("-inf"), dtype=logits.dtype.element_ty)
        tl.store(logits + sequence * logits_stride + column, value, mask=live & ruled_out)


def apply_token_masks(logits: Tensor, masks: Tensor, mask_rows: Tensor) -> None:
    sequences, vocab_size = logits.shape
    assert logits.stride(1) == 1
    assert masks.dtype == mask_rows.dtype == torch.int32
    assert masks.is_contiguous()
    assert masks.shape[1] == triton.cdiv(vocab_size, 32)
    assert mask_rows.shape == (sequences,)
    if sequences == 0:
        return
    grid = (sequences, triton.cdiv(vocab_size, _BLOCK))
    apply_token_masks_kernel[grid](
        logits, masks, mask_rows, logits.stride(0), masks.shape[1], vocab_size, block=_BLOCK, num_warps=4
    )
