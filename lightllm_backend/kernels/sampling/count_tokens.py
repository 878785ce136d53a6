# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Counts how often each token occurs in a sequence."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightllm_backend.kernels.sampling.reference import IN_PROMPT
from lightllm_backend.kernels.sizes import cdiv

_BLOCK = 1024


@triton.jit
def count_tokens_kernel(
    tokens,
    rows,
    prompt_lengths,
    lengths,
    count,
    tokens_stride,
    vocab_size,
    in_prompt: tl.constexpr,
    block: tl.constexpr,
):
    """Handles one block of a sequence's tokens."""
    sequence = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * block
    length = tl.load(lengths + sequence)
    if start < length:
        prompt_length = tl.load(prompt_lengths + sequence)
        position = start + tl.arange(0, block)
        live = position < length
        row = tl.load(rows + sequence).to(tl.int64)
        token = tl.load(tokens + row * tokens_stride + position, mask=live, other=0)
        address = count + sequence * vocab_size + token
        tl.atomic_or(address, tl.full([block], in_prompt, dtype=tl.int32), mask=live & (position < prompt_length))
        tl.atomic_add(address, tl.full([block], 1, dtype=tl.int32), mask=live & (position >= prompt_length))


def count_tokens(tokens: Tensor, rows: Tensor, prompt_lengths: Tensor, lengths: Tensor, vocab_size: int) -> Tensor:
    sequences, longest = rows.shape[0], tokens.shape[1]
    assert tokens.stride(1) == 1
    count = torch.zeros((sequences, vocab_size), dtype=torch.int32, device=tokens.device)
    if sequences == 0 or longest == 0:
        return count
    grid = (sequences, cdiv(longest, _BLOCK))
    count_tokens_kernel[grid](
        tokens,
        rows,
        prompt_lengths,
        lengths,
        count,
        tokens.stride(0),
        vocab_size,
        in_prompt=IN_PROMPT,
        block=_BLOCK,
        num_warps=4,
    )
    return count
