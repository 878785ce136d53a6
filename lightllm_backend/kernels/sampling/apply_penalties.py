# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Applies repetition, frequency and presence penalties, and rules out ending tokens before `min_tokens`."""

import triton
import triton.language as tl
from torch import Tensor

from lightllm_backend.kernels.sampling.count_tokens import count_tokens
from lightllm_backend.kernels.sampling.reference import IN_PROMPT
from lightllm_backend.kernels.sizes import cdiv

_BLOCK = 1024


@triton.jit(do_not_specialize=["ending_count"])
def apply_penalties_kernel(
    logits,
    count,
    prompt_lengths,
    lengths,
    presence,
    frequency,
    repetition,
    min_tokens,
    ending_ids,
    logits_stride,
    vocab_size,
    ending_count,
    in_prompt: tl.constexpr,
    block: tl.constexpr,
):
    """Handles one block of a sequence's logits."""
    sequence = tl.program_id(0).to(tl.int64)
    presence_penalty = tl.load(presence + sequence)
    frequency_penalty = tl.load(frequency + sequence)
    factor = tl.load(repetition + sequence)
    generated_length = tl.load(lengths + sequence) - tl.load(prompt_lengths + sequence)
    is_penalised = (presence_penalty != 0) | (frequency_penalty != 0) | (factor != 1)
    is_too_short = generated_length < tl.load(min_tokens + sequence)
    if is_penalised | is_too_short:
        column = tl.program_id(1) * block + tl.arange(0, block)
        live = column < vocab_size
        address = logits + sequence * logits_stride + column
        value = tl.load(address, mask=live, other=0.0)
        if is_penalised:
            seen = tl.load(count + sequence * vocab_size + column, mask=live, other=0)
            generated = seen & (in_prompt - 1)
            value = tl.where(seen > 0, tl.where(value > 0, value / factor, value * factor), value)
            penalty = generated.to(tl.float32) * frequency_penalty + presence_penalty
            value = tl.where(generated > 0, value - penalty, value)
        if is_too_short:
            for index in range(ending_count):
                ruled_out = tl.load(ending_ids + sequence * ending_count + index)
                value = tl.where(column == ruled_out, float("-inf"), value)
        tl.store(address, value, mask=live)


def apply_penalties(
    logits: Tensor,
    tokens: Tensor,
    rows: Tensor,
    prompt_lengths: Tensor,
    lengths: Tensor,
    presence: Tensor,
    frequency: Tensor,
    repetition: Tensor,
    min_tokens: Tensor,
    ending_ids: Tensor,
) -> None:
    sequences, vocab_size = logits.shape
    assert logits.stride(1) == 1
    assert ending_ids.is_contiguous()
    if sequences == 0:
        return
    count = count_tokens(tokens, rows, prompt_lengths, lengths, vocab_size)
    grid = (sequences, cdiv(vocab_size, _BLOCK))
    apply_penalties_kernel[grid](
        logits,
        count,
        prompt_lengths,
        lengths,
        presence,
        frequency,
        repetition,
        min_tokens,
        ending_ids,
        logits.stride(0),
        vocab_size,
        ending_ids.shape[1],
        in_prompt=IN_PROMPT,
        block=_BLOCK,
        num_warps=4,
    )
