# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Draws the next token: temperature, min-p, top-k and top-p without sorting, and a counted random number (Philox)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightllm_backend.kernels.sizes import next_power_of_2

_BLOCK = 8192


@triton.jit
def _order(value):
    """Maps floats to integers in the same order; 0.0 and -0.0 become equal."""
    bits = tl.where(value == 0, 0.0, value).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _greatest(row, vocab_size, block: tl.constexpr):
    """The greatest logit and the first column that holds it: -1 if a logit is NaN or the greatest is infinite."""
    value = tl.full([block], float("-inf"), dtype=tl.float32)
    place = tl.zeros([block], dtype=tl.int32)
    for start in range(0, vocab_size, block):
        column = start + tl.arange(0, block)
        new = tl.load(row + column, mask=column < vocab_size, other=float("-inf"))
        place = tl.where(new > value, column, place)
        value = tl.maximum(value, new, propagate_nan=tl.PropagateNan.ALL)
    maximum = tl.max(value, 0)
    place = tl.where(value == maximum, place, vocab_size)
    first = tl.min(tl.where(value != value, -1, place), 0)
    return maximum, tl.where(tl.abs(maximum) < float("inf"), first, -1)


@triton.jit
def _weigh(row, vocab_size, threshold, maximum, temperature, block: tl.constexpr):
    """The sum of the weights of the logits whose order is at least the threshold."""
    total = tl.zeros([block], dtype=tl.float32)
    for start in range(0, vocab_size, block):
        column = start + tl.arange(0, block)
        value = tl.load(row + column, mask=column < vocab_size, other=float("-inf"))
        total += tl.where(_order(value) >= threshold, tl.exp((value - maximum) / temperature), 0.0)
    return tl.sum(total, 0)


@triton.jit
def _find_threshold(
    row,
    vocab_size,
    low,
    high,
    needed,
    maximum,
    temperature,
    is_weighed: tl.constexpr,
    block: tl.constexpr,
):
    """The highest order from `low` to `high` at which the logits not below it count, or weigh, as much as is needed.

    The range of the order's 32 bits is halved, and then shrunk to the nearest logits, until it holds one of them.
    """
    while low < high:
        middle = (low + (high - low + 1) // 2).to(tl.int32)
        total = tl.zeros([block], dtype=tl.float32)
        above = tl.full([block], 0x7FFFFFFF, dtype=tl.int32)
        below = tl.full([block], -0x7FFFFFFF, dtype=tl.int32)
        for start in range(0, vocab_size, block):
            column = start + tl.arange(0, block)
            value = tl.load(row + column, mask=column < vocab_size, other=float("-inf"))
            order = _order(value)
            is_above = order >= middle
            amount = tl.exp((value - maximum) / temperature) if is_weighed else 1.0
            total += tl.where(is_above, amount, 0.0)
            above = tl.minimum(above, tl.where(is_above, order, 0x7FFFFFFF))
            below = tl.maximum(below, tl.where(is_above, -0x7FFFFFFF, order))
        is_enough = tl.sum(total, 0) >= needed
        low = tl.where(is_enough, tl.minimum(tl.min(above, 0).to(tl.int64), high), low)
        high = tl.where(is_enough, high, tl.maximum(tl.max(below, 0).to(tl.int64), low))
    return low


@triton.jit
def _draw(row, vocab_size, threshold, maximum, temperature, target, block: tl.constexpr):
    """The first place at which the sum of the weights so far exceeds the target."""
    before = 0.0
    chosen = vocab_size
    last = 0
    for start in range(0, vocab_size, block):
        column = start + tl.arange(0, block)
        value = tl.load(row + column, mask=column < vocab_size, other=float("-inf"))
        weight = tl.where(_order(value) >= threshold, tl.exp((value - maximum) / temperature), 0.0)
        has_crossed = (before + tl.cumsum(weight, 0) > target) & (weight > 0)
        chosen = tl.minimum(chosen, tl.min(tl.where(has_crossed, column, vocab_size), 0))
        last = tl.maximum(last, tl.max(tl.where(weight > 0, column, 0), 0))
        before += tl.sum(weight, 0)
    # Sums in another order may fall short of the target by rounding; then the last token with weight is meant.
    return tl.where(chosen < vocab_size, chosen, last)


@triton.jit
def sample_kernel(
    logits,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    seeds,
    positions,
    places,
    table,
    tokens,
    logits_stride,
    vocab_size,
    block: tl.constexpr,
):
    """Handles one sequence."""
    sequence = tl.program_id(0).to(tl.int64)
    row = logits + sequence * logits_stride
    maximum, token = _greatest(row, vocab_size, block)
    temperature = tl.load(temperatures + sequence)
    # Without a finite maximum there is no distribution to draw from.
    if (temperature > 0) & (token >= 0):
        # Below this bound every other token's weight is 0 anyway, and a quotient of 0 could overflow to NaN.
        temperature = tl.maximum(temperature, 1e-20)
        threshold = _order(tl.full([1], float("-inf"), dtype=tl.float32))
        threshold = tl.max(threshold, 0).to(tl.int64)
        min_p = tl.load(min_ps + sequence)
        if min_p > 0:
            lowest = tl.zeros([1], dtype=tl.float32) + maximum + temperature * tl.log(min_p)
            threshold = tl.max(_order(lowest), 0).to(tl.int64)
        highest = tl.max(_order(tl.zeros([1], dtype=tl.float32) + maximum), 0).to(tl.int64)
        top_k = tl.load(top_ks + sequence)
        if (top_k > 0) & (top_k < vocab_size):
            threshold = _find_threshold(row, vocab_size, threshold, highest, top_k, maximum, temperature, False, block)
        total = _weigh(row, vocab_size, threshold.to(tl.int32), maximum, temperature, block)
        top_p = tl.load(top_ps + sequence)
        if top_p < 1:
            needed = top_p * total
            threshold = _find_threshold(row, vocab_size, threshold, highest, needed, maximum, temperature, True, block)
            total = _weigh(row, vocab_size, threshold.to(tl.int32), maximum, temperature, block)
        counter = tl.load(positions + sequence)
        zero = counter * 0
        word, _, _, _ = tl.philox(tl.load(seeds + sequence), counter, zero, zero, zero)
        target = (word >> 8).to(tl.float32) * (2.0**-24) * total
        token = _draw(row, vocab_size, threshold.to(tl.int32), maximum, temperature, target, block)
    tl.store(tokens + sequence, token)
    tl.store(table + tl.load(places + sequence), tl.maximum(token, 0))


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
    places: Tensor,
    table: Tensor,
) -> Tensor:
    sequences, vocab_size = logits.shape
    assert logits.dtype == torch.float32
    assert logits.stride(1) == 1
    assert places.is_contiguous()
    assert table.is_contiguous()
    tokens = torch.empty(sequences, dtype=torch.int32, device=logits.device)
    if sequences == 0:
        return tokens
    block = min(_BLOCK, next_power_of_2(vocab_size))
    sample_kernel[(sequences,)](
        logits,
        temperature,
        top_k,
        top_p,
        min_p,
        seed,
        position,
        places,
        table,
        tokens,
        logits.stride(0),
        vocab_size,
        block=block,
        num_warps=16 if block == _BLOCK else 4,
    )
    return tokens
