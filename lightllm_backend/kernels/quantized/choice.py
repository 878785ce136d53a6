# SPDX-License-Identifier: Apache-2.0
"""Whether quantized_prefetch computes a product with a weight of 4 or 8 bits, and in which blocks."""

from pathlib import Path
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor

from lightllm_backend.kernels.hardware import compute_capability, has_descriptors, multiprocessor_count
from lightllm_backend.kernels.linear.choice import MIN_PROGRAM_SHARE, product_name, stored_blocks
from lightllm_backend.kernels.quantized.fragments import CHUNK
from lightllm_backend.kernels.quantized.rounded_tokens import Activations, PairedTokens, RoundedTokens
from lightllm_backend.kernels.quantized.weight import QuantizedWeight, Weight

# The token counts that blocks are tuned for; a product takes those of the next larger one.
PREFETCH_TOKENS = (8, 16, 32, 64, 128, 256)
# The most tokens of a program; more are further programs. Blocks may ask for the larger one.
MAX_BLOCK_TOKENS, MOST_BLOCK_TOKENS = 128, 256
# Up to so many tokens, activations stay in 16 bits although the checkpoint wants 8: those of fp8 by channel that the
# kernel before the product rounds at no cost, and all others.
MAX_16_BIT_ROUNDED = 8
MAX_16_BIT_TOKENS = 64
# The same of pairs of 8-bit numbers, which norms write of so many tokens where blocks are stored for them, by the
# weight's kind. At one token, a step of int4 takes 1.51 instead of 1.57 ms, at 8 1.72 instead of 1.81, at 16 1.99
# instead of 2.04, and at 32 as long; of fp8, at one 2.07 to 2.10 instead of 2.11 (7B, H200).
PAIRED_TOKENS = {"fp8": (4,), "int4": (4, 8, 16)}
# Blocks by compute capability, product and token count, null: other kernels are quicker.
BLOCKS = Path(__file__).with_name("quantized_prefetch.json")  # written by perf/tune_quantized.py
# Shared memory of a multiprocessor, and what of it the system and the barriers of each program take.
SHARED_BYTES, BYTES_OF_PROGRAM = 233_472, 1_700
MAX_STAGES = 16


class PrefetchBlocks(NamedTuple):
    """A program's tile of the weight, rows and the columns of a step, and how the work is spread."""

    out: int
    inner: int
    stages: int
    warps: int  # of a consumer
    consumers: int  # one or two groups of warps, which take the steps in turns
    splits: int  # of the inner dimension
    programs_per_sm: int  # how many programs are to share a multiprocessor
    tokens: int = MAX_BLOCK_TOKENS  # of a program, at most
    fetched: int = 0  # columns behind those of the stages that are asked for early, too, into the L2 cache


def row_tiles_of(blocks: PrefetchBlocks) -> int:
    """How many tiles of rows a program has, each of a consumer of its own: three, else one."""
    return 3 if blocks.out % 3 == 0 else 1


def prefetch_blocks(x: Activations, weight: QuantizedWeight, is_gated: bool) -> PrefetchBlocks | None:
    """The blocks for the product with `x` [tokens, in_features]; None: other kernels compute it."""
    tokens, out_features = x.shape[0], weight.shape[0]
    read = x if isinstance(x, Tensor) else x.values
    is_sized = 0 < tokens <= PREFETCH_TOKENS[-1] and out_features % (32 if is_gated else 16) == 0
    if not is_sized or not weight.in_fragments or x.dtype.itemsize != 2 or not has_descriptors(read, weight.values):
        return None
    if tokens > MAX_16_BIT_TOKENS and weight.quantizes_input and not is_direct(weight):
        return None
    rounds = isinstance(x, RoundedTokens) or (tokens > MAX_16_BIT_TOKENS and is_direct(weight))
    is_paired = isinstance(x, PairedTokens)
    counts = PAIRED_TOKENS[kind_of(weight)] if is_paired else PREFETCH_TOKENS
    padded = next(count for count in counts if tokens <= count)
    kind = f"{kind_of(weight)} by pairs" if is_paired else kind_of(weight, rounds)
    row = _stored_row(kind, weight, is_gated)
    if str(padded) in row:
        if (stored := row[str(padded)]) is None:
            return None
        blocks = PrefetchBlocks(*stored)
        # They are tuned with groups of 128; the scales of smaller ones take shared memory from the stages.
        stages = min(blocks.stages, most_stages(blocks, padded, weight, is_gated, rounds))
        if stages >= 2 * blocks.consumers:
            return blocks._replace(stages=stages)
    return blocks_by_rule(padded, weight, is_gated, multiprocessor_count(read.device), rounds)


def _stored_row(kind: str, weight: QuantizedWeight, is_gated: bool) -> dict[str, list[int] | None]:
    """What is stored for a product with such a weight on its GPU, by token count."""
    table = stored_blocks(BLOCKS).get("{}.{}".format(*compute_capability(weight.values.device)), {})
    return table.get(f"{kind}, {product_name(*weight.shape, is_gated)}", {})


def kind_of(weight: QuantizedWeight, rounds: bool = False) -> str:
    """The weight's kind, with activations in 8 bits or not, as quantized_prefetch.json calls it."""
    if weight.is_int4:
        return "int4"
    return "int8" if weight.values.dtype == torch.int8 else "fp8 by fp8" if rounds else "fp8"


def is_direct(weight: QuantizedWeight) -> bool:
    """Whether tensor cores multiply the weight by activations of 8 bits as they are, with scales applied at the end."""
    return kind_of(weight) == "fp8" and weight.quantizes_input and weight.num_groups == 1 and weight.zeros is None


def has_16_bit_parts(dtype: torch.dtype) -> bool:
    """Whether a product that is split leaves its parts in 16 bits, which norms read sooner, not in 32.

    Rounding the parts loses about as much as rounding the sum, unless they cancel. In float16 a part might overflow
    where the sum does not, so these stay in float32. In a decode step of 7B on an H200, this saves 1.4 % of the time
    with 128 sequences in fp8 and 1.7 % in int4, 4.4 and 4.6 % with 64, 2.5 and 1.7 % with 32.
    """
    return dtype == torch.bfloat16


def takes_rounded(weight: Weight | None, tokens: int, dtype: torch.dtype) -> TypeGuard[QuantizedWeight]:
    """Whether a kernel that writes activations for the product with `weight` alone should round them itself."""
    return (
        isinstance(weight, QuantizedWeight)
        and weight.in_fragments
        and weight.order is None
        and is_direct(weight)
        and tokens > MAX_16_BIT_ROUNDED
        and dtype.itemsize == 2
    )


def takes_paired(weight: Weight | None, tokens: int, dtype: torch.dtype) -> TypeGuard[QuantizedWeight]:
    """Whether a norm that writes activations for the product with `weight` alone should make PairedTokens of them."""
    if not isinstance(weight, QuantizedWeight) or not weight.in_fragments or dtype.itemsize != 2:
        return False
    kind = kind_of(weight)
    can_be = weight.order is None and weight.zeros is None and (kind == "int4" or weight.num_groups == 1)
    padded = next((count for count in PAIRED_TOKENS.get(kind, ()) if 0 < tokens <= count), None)
    rows = (_stored_row(f"{kind} by pairs", weight, is_gated) for is_gated in (False, True))
    return can_be and padded is not None and any(str(padded) in row for row in rows)


def pair_dtype(weight: QuantizedWeight) -> torch.dtype:
    return torch.int8 if weight.is_int4 else torch.float8_e4m3fn


def starts_early(reader: Weight | None) -> bool:
    """Whether a norm should let the product with `reader` start at once, to copy the weight."""
    return isinstance(reader, QuantizedWeight) and reader.in_fragments


def blocks_by_rule(
    tokens: int, weight: QuantizedWeight, is_gated: bool, multiprocessors: int, rounds: bool = False
) -> PrefetchBlocks | None:
    """Blocks for a weight without stored ones. None: nothing fits, or cuBLAS is quicker.

    They are what quantized_prefetch.json mostly has: for few tokens, small tiles, and several programs on each
    multiprocessor, as long as its registers and shared memory allow it; where the tensor cores take longer than the
    memory, larger tiles for several groups of warps, which read the tokens less often. Over the 60 products that
    perf/tune_quantized.py timed in full on an H200 they are slower than the best by 1 to 3 % on average, by kind.
    """
    out_features, in_features = weight.shape
    if rounds and tokens > MAX_BLOCK_TOKENS and not is_gated and out_features >= 64 * multiprocessors:
        return None
    token_tiles = -(-tokens // MAX_BLOCK_TOKENS)

    def rows_in_turn(rows: int) -> int:
        """How many rows the busiest multiprocessor has if it takes tiles of so many one after the other."""
        return -(-out_features // rows * token_tiles // multiprocessors) * rows

    inner = 128 if in_features % 128 == 0 else CHUNK
    rows, warps, consumers, beside = 64, 4, 1, 1
    if tokens > MAX_16_BIT_TOKENS and not rounds and (inner == CHUNK or not (weight.is_int4 or weight.num_groups == 1)):
        consumers = 2
    elif tokens > MAX_16_BIT_TOKENS and not rounds and rows_in_turn(192) <= rows_in_turn(128):
        rows = 192
    elif tokens > MAX_16_BIT_TOKENS or rounds:
        if not rounds or out_features >= MIN_PROGRAM_SHARE * multiprocessors * 128:
            rows, warps = 128, 8
    else:
        inner = 256 if weight.is_int4 and in_features % 256 == 0 and not (is_gated and tokens > 32) else inner
        beside = 3 if is_gated and out_features <= 3 * multiprocessors * rows else 2
        if is_gated and beside == 2:
            rows = 128
        elif not is_gated and not weight.is_int4 and tokens <= 32:
            consumers = 2
    programs, steps, splits = -(-out_features // rows) * token_tiles, in_features // inner, 1
    consumers = min(consumers, steps)
    if not is_gated:
        possible = [
            n for n in (1, 2, 4) if n == 1 or (steps >= 2 * n and (n - 1) * -(-steps // n) + consumers <= steps)
        ]
        enough = [n for n in possible if programs * n >= MIN_PROGRAM_SHARE * multiprocessors * beside]
        splits = min(enough, default=possible[-1])
    blocks = PrefetchBlocks(rows, inner, 1, warps, consumers, splits, beside)
    for programs_per_sm in range(beside, 0, -1):
        blocks = blocks._replace(programs_per_sm=programs_per_sm)
        stages = most_stages(blocks, tokens, weight, is_gated, rounds)
        if stages >= 2 * consumers:
            return blocks._replace(stages=stages)
    return None


def most_groups(weight: QuantizedWeight, columns: int) -> int:
    """How many groups of columns a split of so many may touch, as a power of 2 that shared memory is allocated for."""
    groups = -(-columns // weight.group_size) + (columns % weight.group_size != 0)
    return 1 << (max(2, groups) - 1).bit_length()


def most_stages(
    blocks: PrefetchBlocks, tokens: int, weight: QuantizedWeight, is_gated: bool = False, rounds: bool = False
) -> int:
    """How many stages fit, a multiple of the consumers, if as many programs share a multiprocessor as planned."""
    tokens, rows = min(tokens, blocks.tokens), blocks.out
    of_groups = 0
    if weight.num_groups > 1:
        columns = -(-weight.shape[1] // blocks.inner // blocks.splits) * blocks.inner
        row_bytes = weight.scales.element_size() + (weight.zeros is not None)
        of_groups = most_groups(weight, columns) * rows * row_bytes
    # A result in 16 bits is rearranged in shared memory, beside the second consumer's sum.
    of_sums = rows * tokens * (1 if is_gated else 2)
    if blocks.consumers > 1:
        of_sums += 4 * rows * tokens
    free = SHARED_BYTES // blocks.programs_per_sm - BYTES_OF_PROGRAM - of_sums - of_groups
    fitting = free // (blocks.inner * (rows // (2 if weight.is_int4 else 1) + (1 if rounds else 2) * tokens))
    return min(fitting, MAX_STAGES) // blocks.consumers * blocks.consumers
