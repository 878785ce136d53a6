# SPDX-License-Identifier: Apache-2.0
"""Which kernel multiplies how many tokens by which weight, and in which blocks: see `choose_kernel`."""

import json
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from lightllm_backend.kernels.hardware import GLUON_TRIED, compute_capability, has_descriptors, multiprocessor_count

# The token counts that blocks are tuned for; a product takes the blocks of the next larger one.
FEW_TOKENS = (16, 32, 64)  # bounded by reading the weight: linear_splits, gated_linear
MORE_TOKENS = (128, 256)  # reading and multiplying take about as long: linear_tiles
# Up to here, cuBLAS and then silu_and_mul are as quick as gated_tiles (measured on an H100 at its power limit).
MAX_UNFUSED_TOKENS = 1024

# Blocks by compute capability, product (see `product_name`) and token count; null: cuBLAS is quicker.
BLOCKS = Path(__file__).with_name("linear_blocks.json")  # written by perf/tune_linear.py
PREFETCH_BLOCKS = Path(__file__).with_name("linear_prefetch.json")  # written by perf/tune_prefetch.py
# The rule for weights that are not in linear_blocks.json splits the inner dimension until this share of the
# multiprocessors has a program. It lies between 64 and 80 programs on the 132 multiprocessors of an H200: for up to 32
# tokens the file has two splits for nearly all weights of 4096 output features (64 programs) and 2048 or more input
# features; for 5120 (80 programs) it has one as often as more. `python -m perf.tune_linear --rule` times the rule.
MIN_PROGRAM_SHARE = 0.55


class ProductKernel(Enum):
    """What computes a product; the files of this folder hold the kernels."""

    CUBLAS = "cublas"
    UNFUSED = "linear, then silu_and_mul"  # of a gated product; linear has a choice of its own
    SPLITS = "linear_splits"  # gated: gated_linear
    TILES = "linear_tiles"
    PREFETCH = "linear_prefetch"
    GATED_TILES = "gated_tiles"


class LinearBlocks(NamedTuple):
    """A program's tile of the weight, rows and columns, and how the work is spread."""

    out: int
    inner: int
    num_stages: int
    num_warps: int
    splits: int  # of the inner dimension
    programs_per_sm: int = 0  # of linear_prefetch: how many programs are to share a multiprocessor


class Choice(NamedTuple):
    kernel: ProductKernel
    blocks: LinearBlocks | None = None  # None: the kernel has blocks of its own


class Gpu(NamedTuple):
    """What the choice depends on besides the product."""

    capability: tuple[int, int]
    multiprocessors: int
    has_descriptors: bool = False  # x and the weight can be read by TMA descriptors
    has_gluon: bool = False  # Triton-lang's Gluon is the one that our kernels were tried with


def choose_kernel(tokens: int, out_features: int, in_features: int, is_gated: bool, has_bias: bool, gpu: Gpu) -> Choice:
    """The kernel for a product of 16-bit numbers, the first that applies:

        1 to 64 tokens      linear_prefetch, if linear_prefetch.json has blocks for the weight (Hopper)
                            linear_splits, or gated_linear, unless linear_blocks.json says that cuBLAS is quicker;
                            a weight that is not in the file has its blocks by a rule
                            cuBLAS
        65 to 256 tokens    linear_prefetch, if linear_prefetch.json has blocks for the weight (Hopper)
                            linear_tiles, if linear_blocks.json has blocks for the weight (Hopper)
                            cuBLAS
        257 to 1024 tokens  cuBLAS
        more tokens         gated_tiles, if the product is gated and without bias (Hopper)
                            cuBLAS

    Where cuBLAS is named, a gated product is `linear`, with a choice of its own, and silu_and_mul. GPUs before Ampere
    leave all products to cuBLAS.
    """
    unserved = Choice(ProductKernel.UNFUSED if is_gated else ProductKernel.CUBLAS)
    if tokens > MAX_UNFUSED_TOKENS:
        can_fuse = is_gated and not has_bias and out_features % 16 == 0
        is_hopper = gpu.capability == (9, 0) and gpu.has_descriptors
        return Choice(ProductKernel.GATED_TILES) if can_fuse and is_hopper else unserved
    if not 0 < tokens <= MORE_TOKENS[-1] or gpu.capability < (8, 0):
        return unserved
    product = (product_name(out_features, in_features, is_gated), str(padded_tokens(tokens)))
    if gpu.has_descriptors and gpu.has_gluon:
        is_stored, blocks = _look_up(PREFETCH_BLOCKS, gpu.capability, *product)
        if is_stored:
            return Choice(ProductKernel.PREFETCH, blocks)
    is_stored, blocks = _look_up(BLOCKS, gpu.capability, *product)
    if tokens > FEW_TOKENS[-1]:
        return Choice(ProductKernel.TILES, blocks) if blocks and gpu.has_descriptors else unserved
    if not is_stored:
        blocks = blocks_by_rule(out_features, in_features, is_gated, gpu)
    return Choice(ProductKernel.SPLITS, blocks) if blocks else unserved


def choice_for(x: Tensor, weight: Tensor, bias: Tensor | None = None, is_gated: bool = False) -> Choice:
    """`choose_kernel` for `x` [tokens, in_features] and `weight` [out_features, in_features] on their GPU."""
    if x.element_size() != 2:
        return Choice(ProductKernel.UNFUSED if is_gated else ProductKernel.CUBLAS)
    capability, multiprocessors = compute_capability(x.device), multiprocessor_count(x.device)
    gpu = Gpu(capability, multiprocessors, has_descriptors(x, weight), GLUON_TRIED)
    out_features, in_features = weight.shape
    return choose_kernel(x.shape[0], out_features, in_features, is_gated, bias is not None, gpu)


def _look_up(path: Path, capability: tuple[int, int], product: str, tokens: str) -> tuple[bool, LinearBlocks | None]:
    """Whether the file has an entry, and its blocks; None: cuBLAS is quicker."""
    table = stored_blocks(path).get("{}.{}".format(*capability), {}).get(product, {})
    blocks = table.get(tokens)
    return tokens in table, None if blocks is None else LinearBlocks(*blocks)


def blocks_by_rule(out_features: int, in_features: int, is_gated: bool, gpu: Gpu) -> LinearBlocks | None:
    """Blocks for up to 64 tokens and a weight without stored ones. None: the blocks would not divide the weight.

    The inner dimension is split until most multiprocessors have a program. The fewer programs a multiprocessor has, the
    more stages each takes, to keep as many reads in flight.
    """
    out, inner, splits = 64, 128, 1
    if out_features % out or in_features % inner:
        return None
    programs = out_features // out
    while (
        programs * splits < MIN_PROGRAM_SHARE * gpu.multiprocessors
        and splits < 8
        and in_features % (2 * splits * inner) == 0
    ):
        splits *= 2
    if is_gated and splits > 1:
        return None
    share = programs * splits / gpu.multiprocessors
    # linear_blocks.json, from an H200, has 5 or 6 stages up to 0.97 programs each, and mostly 4 from 1.9 on. In
    # between it has larger tiles, so the 3 has no stored measurement.
    num_stages = (5 if share <= 1.1 else 3 if share <= 1.6 else 4) if gpu.capability == (9, 0) else 4
    return LinearBlocks(out, inner, num_stages, 4, splits)


def product_name(out_features: int, in_features: int, is_gated: bool) -> str:
    return f"{out_features} x {in_features}{', gated' if is_gated else ''}"


def padded_tokens(tokens: int) -> int:
    """The next token count that blocks are tuned for."""
    return next(count for count in FEW_TOKENS + MORE_TOKENS if tokens <= count)


@lru_cache
def stored_blocks(path: Path) -> dict[str, dict[str, dict[str, list[int] | None]]]:
    """What a JSON file stores: by compute capability, product and token count."""
    stored: dict[str, dict[str, dict[str, list[int] | None]]] = json.loads(path.read_text())["blocks"]
    return stored
