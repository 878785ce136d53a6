# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Greedy choice of each sequence's next token, also written to the table from which the next step reads it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightllm_backend.kernels.dependent_launch import dependent_launch, wait_for_previous

_BLOCK = 16384


@triton.jit
def choose_greedily_kernel(
    logits,
    places,
    table,
    tokens,
    logits_stride,
    vocab_size: tl.constexpr,
    is_dependent: tl.constexpr,
    block: tl.constexpr,
):
    """Handles one sequence. `vocab_size` is a constant so that all loads of the row are issued before any is used."""
    sequence = tl.program_id(0).to(tl.int64)
    row = logits + sequence * logits_stride
    place = tl.load(places + sequence)
    wait_for_previous(is_dependent)
    greatest = tl.full([block], float("-inf"), dtype=tl.float32)
    token = tl.zeros([block], dtype=tl.int32)
    for start in tl.static_range(0, vocab_size, block):
        column = start + tl.arange(0, block)
        logit = tl.load(row + column, mask=column < vocab_size, other=float("-inf")).to(tl.float32)
        token = tl.where(logit > greatest, column, token)
        greatest = tl.maximum(greatest, logit)
    chosen = tl.min(tl.where(greatest == tl.max(greatest, 0), token, vocab_size), 0)
    # A row of NaN has no maximum.
    chosen = tl.where(chosen < vocab_size, chosen, 0)
    tl.store(tokens + sequence, chosen)
    tl.store(table + place, chosen)


def choose_greedily(logits: Tensor, places: Tensor, table: Tensor) -> Tensor:
    sequences, vocab_size = logits.shape
    assert logits.stride(1) == 1
    assert places.is_contiguous()
    assert table.is_contiguous()
    tokens = torch.empty(sequences, dtype=torch.int32, device=logits.device)
    if sequences == 0:
        return tokens
    block = min(_BLOCK, triton.next_power_of_2(vocab_size))
    choose_greedily_kernel[(sequences,)](
        logits,
        places,
        table,
        tokens,
        logits.stride(0),
        vocab_size=vocab_size,
        block=block,
        num_warps=16 if block == _BLOCK else 4,
        **dependent_launch(logits.device),
    )
    return tokens
