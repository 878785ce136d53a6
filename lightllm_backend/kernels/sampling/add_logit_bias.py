# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Adds each sequence's own biases to the logits of a few tokens."""

import triton
import triton.language as tl
from torch import Tensor

from lightllm_backend.kernels.sizes import next_power_of_2


@triton.jit
def add_logit_bias_kernel(
    logits,
    rows,
    counts,
    token_ids,
    biases,
    logits_stride,
    width: tl.constexpr,
    block: tl.constexpr,
):
    """Handles one sequence."""
    sequence = tl.program_id(0).to(tl.int64)
    count = tl.load(counts + sequence)
    if count > 0:
        entry = tl.arange(0, block)
        live = entry < count
        place = tl.load(rows + sequence).to(tl.int64) * width + entry
        address = logits + sequence * logits_stride + tl.load(token_ids + place, mask=live, other=0)
        value = tl.load(address, mask=live, other=0.0)
        tl.store(address, value + tl.load(biases + place, mask=live, other=0.0), mask=live)


def add_logit_bias(logits: Tensor, rows: Tensor, counts: Tensor, token_ids: Tensor, biases: Tensor) -> None:
    sequences, width = logits.shape[0], token_ids.shape[1]
    assert logits.stride(1) == 1
    assert token_ids.is_contiguous()
    assert biases.is_contiguous()
    if sequences == 0:
        return
    add_logit_bias_kernel[(sequences,)](
        logits,
        rows,
        counts,
        token_ids,
        biases,
        logits.stride(0),
        width=width,
        block=next_power_of_2(width),
        num_warps=4,
    )
