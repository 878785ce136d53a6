# SPDX-License-Identifier: Apache-2.0
"""How the product of so many tokens with a weight is cut for our own kernels, or that cuBLAS is quicker.

For known models it is stored in linear_blocks.json, by GPU; others go by a rule.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lightllm_backend.kernels.hardware import GLUON_TRIED, compute_capability, has_descriptors, multiprocessor_count

# Tokens are padded to one of these numbers: for kernels of linear_splits and gated_linear,
FEW_TOKENS = (16, 32, 64)
# and of linear_tiles. Beyond, cuBLAS is as quick but for gated products, see gated_tiles.
MORE_TOKENS = (128, 256)

STORED = Path(__file__).with_name("linear_blocks.json")
STORED_PREFETCH = STORED.with_name("linear_prefetch.json")


class LinearBlocks(NamedTuple):
    """A program's tile of the weight, rows and columns, and how the work is spread."""

    out: int
    inner: int
    num_stages: int
    num_warps: int
    splits: int
    # Of linear_prefetch: how many programs are to share a multiprocessor. 0: the blocks are for another kernel.
    programs_per_sm: int = 0


@lru_cache
def stored_blocks(path: Path = STORED) -> dict[str, dict[str, dict[str, list[int] | None]]]:
    """By compute capability and product, see `product_name`, and block of tokens; null: cuBLAS is quicker.

    Written by perf/tune_linear.py and, where linear_prefetch is quicker, by perf/tune_prefetch.py.
    """
    stored: dict[str, dict[str, dict[str, list[int] | None]]] = json.loads(path.read_text())["blocks"]
    return stored


def product_name(out_features: int, in_features: int, is_gated: bool) -> str:
    return f"{out_features} x {in_features}{', gated' if is_gated else ''}"


def choose_blocks(
    tokens: int,
    out_features: int,
    in_features: int,
    is_gated: bool,
    capability: tuple[int, int],
    multiprocessors: int,
    can_prefetch: bool = False,
) -> LinearBlocks | None:
    """As stored. Few tokens of other products by a rule: the inner dimension is split until most multiprocessors have a
    program, and the fewer each has, the more reads it keeps in flight. None where the product is left to cuBLAS."""
    if not 0 < tokens <= MORE_TOKENS[-1] or capability < (8, 0):
        return None
    block_tokens = block_of(tokens)
    for stored_in in (STORED_PREFETCH, STORED) if can_prefetch else (STORED,):
        known = stored_blocks(stored_in).get("{}.{}".format(*capability), {})
        found = known.get(product_name(out_features, in_features, is_gated), {})
        if str(block_tokens) in found:
            stored = found[str(block_tokens)]
            return None if stored is None else LinearBlocks(*stored)
    if block_tokens in MORE_TOKENS:
        return None
    out, inner, splits = 64, 128, 1
    if out_features % out or in_features % inner:
        return None
    programs = out_features // out
    while programs * splits < 0.55 * multiprocessors and splits < 8 and in_features % (2 * splits * inner) == 0:
        splits *= 2
    if is_gated and splits > 1:
        return None
    share = programs * splits / multiprocessors
    num_stages = (5 if share <= 1.1 else 3 if share <= 1.6 else 4) if capability == (9, 0) else 4
    return LinearBlocks(out, inner, num_stages, 4, splits)


def blocks_for(x: Tensor, weight: Tensor, is_gated: bool = False) -> LinearBlocks | None:
    are_described = has_descriptors(x, weight)
    if x.dtype == torch.float32 or (x.shape[0] > FEW_TOKENS[-1] and not are_described):
        return None
    out_features, in_features = weight.shape
    capability, multiprocessors = compute_capability(x.device), multiprocessor_count(x.device)
    can_prefetch = are_described and GLUON_TRIED
    return choose_blocks(x.shape[0], out_features, in_features, is_gated, capability, multiprocessors, can_prefetch)


def block_of(tokens: int) -> int:
    """To how many tokens they are padded."""
    return next(block for block in FEW_TOKENS + MORE_TOKENS if tokens <= block)
