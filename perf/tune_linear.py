# SPDX-License-Identifier: Apache-2.0
"""Finds the best blocks for products of up to 256 tokens on this GPU, and stores them with the kernels.

    python -m perf.tune_linear
    python -m perf.tune_linear --tp 1 --tokens 128,256 llama-7b
    python -m perf.tune_linear --rule

It times all blocks that fit the shared memory, and for linear_tiles the few in TILES, in a CUDA graph: each product is
followed by a norm, as in a model, and the weights together exceed the L2 cache. cuBLAS is timed beside them and keeps
the products at which it is as quick. The result goes to lightllm_backend/kernels/linear/linear_blocks.json, where other
GPUs, products and token counts keep what earlier runs found.

With --rule it stores nothing: it times what the rule for weights without stored blocks can choose, for the same
products, and prints how far the rule's choice is from the quickest.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from lightllm_backend.kernels.hardware import compute_capability, multiprocessor_count
from lightllm_backend.kernels.linear.choice import (
    BLOCKS,
    FEW_TOKENS,
    MORE_TOKENS,
    Choice,
    Gpu,
    LinearBlocks,
    ProductKernel,
    blocks_by_rule,
    product_name,
    stored_blocks,
)
from lightllm_backend.kernels.linear.gated_linear import launch_gated
from lightllm_backend.kernels.linear.linear_splits import launch_product
from lightllm_backend.kernels.linear.linear_tiles import BLOCK_TOKENS
from lightllm_backend.kernels.norm.rms_norm import rms_norm
from lightllm_backend.runner.compile_ahead import compile_ahead
from perf.decode_step import DEVICE, DTYPE
from perf.kernels.measure import seconds_of
from perf.record import circumstances
from perf.shapes import SHAPES, rank_shape

WEIGHT_BYTES = 600 << 20
# Added to the time of split products that no norm sums, and of gated products by cuBLAS.
SUM_SECONDS, ACTIVATION_SECONDS = 1.5e-6, 2e-6
# Our kernels must beat cuBLAS by this share, since cuBLAS may choose better between the token counts that are timed.
MARGIN = 0.02
# Candidates for linear_tiles: rows and columns of a tile, stages, warps.
TILES = [(64, 64, 8, 4), (64, 64, 4, 4), (128, 64, 3, 4), (128, 64, 3, 8), (128, 64, 6, 8), (256, 64, 4, 8)]


class Product(NamedTuple):
    out_features: int
    in_features: int
    is_gated: bool
    norm_sums_parts: bool  # a norm follows at once


def products(config: dict[str, Any], tp: int = 1) -> list[Product]:
    """The products of one rank of a LLaMA, or of a BLOOM on one GPU."""
    config = rank_shape(config, tp)
    hidden, heads = config["hidden_size"], config.get("num_attention_heads") or config["n_head"]
    head_dim = config.get("head_dim", hidden // heads)
    kv_heads = config.get("num_key_value_heads", heads)
    is_gated = "intermediate_size" in config
    features = config.get("intermediate_size", 4 * hidden)
    return [
        Product((heads + 2 * kv_heads) * head_dim, hidden, False, False),
        Product(hidden, heads * head_dim, False, True),
        Product(2 * features if is_gated else features, hidden, is_gated, False),
        Product(hidden, features, False, True),
        Product(config["vocab_size"], hidden, False, False),
    ]


def candidates(product: Product, tokens: int) -> Iterator[LinearBlocks]:
    if tokens in MORE_TOKENS:
        for tile, splits in itertools.product(TILES, (1, 2, 4)):
            programs = product.out_features // tile[0] * (tokens // BLOCK_TOKENS) * splits
            if splits == 1 or (not product.is_gated and programs <= 270):
                yield LinearBlocks(*tile, splits)
        return
    shared = torch.cuda.get_device_properties(DEVICE).shared_memory_per_block_optin
    for out, inner, stages, warps, splits in itertools.product(
        (64, 128), (64, 128, 256), (3, 4, 5, 6, 8), (4, 8), (1, 2, 4, 8)
    ):
        shared_bytes = 2 * (out + tokens) * inner * (stages - 1)
        programs = product.out_features // out * splits
        if (
            product.out_features % out == 0
            and product.in_features % (splits * inner) == 0
            and shared // 6 < shared_bytes < 0.9 * shared
            and (warps == 4 or out == 128)
            and programs >= 40
            and (splits == 1 or (programs <= 800 and not product.is_gated))
        ):
            yield LinearBlocks(out, inner, stages, warps, splits)


def seconds_between_norms(product: Callable[[Tensor], Any], weights: list[Tensor]) -> float:
    """The time of one product between norms, without the norm's own."""
    x, ones = torch.randn(16, 4096, device=DEVICE, dtype=DTYPE), torch.ones(4096, device=DEVICE, dtype=DTYPE)

    def call(weight: Tensor) -> Callable[[], Any]:
        return lambda: (product(weight), rms_norm(x, ones, 1e-5))

    norm = seconds_of([lambda: rms_norm(x, ones, 1e-5)])
    return seconds_of([call(weight) for weight in weights]) - norm


def best_blocks(product: Product, tokens: int) -> LinearBlocks | None:
    """The fastest blocks, or None if cuBLAS is quicker."""
    times = block_times(product, tokens, list(candidates(product, tokens)))
    return min(times, key=lambda blocks: times[blocks])


def rule_against_others(product: Product, tokens: int, gpu: Gpu) -> str:
    """One line: the time with the rule's blocks, and the best time with each number of splits, in microseconds."""
    programs = product.out_features // 64 / gpu.multiprocessors
    head = f"{programs:5.2f} programs a multiprocessor, {product_name(*product[:3])}, {tokens} tokens:"
    chosen = blocks_by_rule(*product[:3], gpu)
    if chosen is None:
        return f"{head} the rule has no blocks"
    tried = [
        chosen._replace(splits=splits, num_stages=stages)
        for splits, stages in itertools.product((1,) if product.is_gated else (1, 2, 4, 8), (3, 4, 5, 6))
        if product.in_features % (splits * chosen.inner) == 0
    ]
    times = block_times(product, tokens, tried)
    quickest = [
        f"{splits} x {best.num_stages} stages {1e6 * times[best]:.2f}"
        for splits in sorted({blocks.splits for blocks in tried})
        for best in [min((blocks for blocks in tried if blocks.splits == splits), key=lambda blocks: times[blocks])]
    ]
    rule = f"{chosen.splits} x {chosen.num_stages} stages {1e6 * times[chosen]:.2f}"
    loss = times[chosen] / min(times[blocks] for blocks in tried) - 1
    return f"{head} rule {rule}, {100 * loss:.1f} % over the quickest of {', '.join(quickest)}"


def block_times(product: Product, tokens: int, tried: list[LinearBlocks]) -> dict[LinearBlocks | None, float]:
    """The seconds that the product takes with each of these blocks; None: with cuBLAS, less the margin."""
    shape = (product.out_features, product.in_features)
    count = max(3, WEIGHT_BYTES // (2 * shape[0] * shape[1]))
    weights = [torch.randn(*shape, device=DEVICE, dtype=DTYPE) / shape[1] ** 0.5 for _ in range(count)]
    x = torch.randn(tokens, shape[1], device=DEVICE, dtype=DTYPE)
    cublas = seconds_between_norms(lambda weight: functional.linear(x, weight), weights)
    times: dict[LinearBlocks | None, float] = {None: (1 - MARGIN) * (cublas + ACTIVATION_SECONDS * product.is_gated)}

    kernel = ProductKernel.TILES if tokens in MORE_TOKENS else ProductKernel.SPLITS

    def run(weight: Tensor, blocks: LinearBlocks) -> None:
        choice = Choice(kernel, blocks)
        if product.is_gated:
            launch_gated(x, weight, None, x.new_empty(tokens, shape[0] // 2), choice)
        else:
            dtype = DTYPE if blocks.splits == 1 else torch.float32
            launch_product(x, weight, None, x.new_empty(blocks.splits, tokens, shape[0], dtype=dtype), choice)

    compile_ahead(lambda: [run(weights[0], blocks) for blocks in tried])
    for blocks in tried:
        extra = SUM_SECONDS if blocks.splits > 1 and not product.norm_sums_parts else 0.0
        times[blocks] = seconds_between_norms(partial(run, blocks=blocks), weights) + extra
    return times


@click.command(help=str(__doc__).partition("\n")[0])
@click.argument("models", nargs=-1, type=click.Choice(list(SHAPES)))
@click.option("--tp", default="1,2,4", show_default=True, help="numbers of GPUs, separated by commas")
@click.option("--tokens", default=",".join(map(str, FEW_TOKENS + MORE_TOKENS)), show_default=True, help="of a step")
@click.option("--rule", is_flag=True, help="time the rule for weights without stored blocks instead")
def main(models: tuple[str, ...], tp: str, tokens: str, rule: bool) -> None:
    names = models or tuple(name for name in SHAPES if name != "tiny")
    sizes = [int(size) for size in tp.split(",")]
    parted = {name: sizes if "intermediate_size" in SHAPES[name] else [1] for name in names}
    found = {product for name in names for size in parted[name] for product in products(SHAPES[name], size)}
    if rule:
        gpu = Gpu(compute_capability(DEVICE), multiprocessor_count(DEVICE))
        for product, count in itertools.product(sorted(found), FEW_TOKENS):
            print(rule_against_others(product, count, gpu), flush=True)
            torch.cuda.empty_cache()
        return
    table = stored_blocks(BLOCKS).setdefault(capability(), {})
    for product in tqdm(sorted(found), unit="product"):
        row = table.setdefault(product_name(*product[:3]), {})
        row.update({count: best_blocks(product, int(count)) for count in tokens.split(",")})
        torch.cuda.empty_cache()
    store(BLOCKS, table, tokens)


def capability() -> str:
    return "{}.{}".format(*torch.cuda.get_device_capability(DEVICE))


def store(path: Path, table: dict[str, dict[str, list[int] | None]], tokens: str) -> None:
    """Store this GPU's table and the origin of its blocks for these token counts; keep those of other GPUs."""
    stored = json.loads(path.read_text())
    ran = circumstances(torch.cuda.get_device_name())
    versions = ran["versions"]
    origin = (ran["machine"]["gpu"], f"torch {versions['torch']}", f"triton {versions['triton']}", ran["date"][:10])
    stored["origin"].setdefault(capability(), {})[tokens] = ", ".join(origin)
    stored["blocks"][capability()] = {name: row for name, row in table.items() if row}
    path.write_text(format_table(stored))
    print(f"written to {path}")


def format_table(stored: dict[str, Any]) -> str:
    """The JSON text, one line per product."""
    text = json.dumps({**stored, "blocks": "TABLES"}, indent=2)
    tables = []
    for capability, table in stored["blocks"].items():
        lines = ",\n".join(f"      {json.dumps(name)}: {json.dumps(blocks)}" for name, blocks in table.items())
        tables.append(f"    {json.dumps(capability)}: {{\n{lines}\n    }}")
    return text.replace('"TABLES"', "{\n" + ",\n".join(tables) + "\n  }") + "\n"


if __name__ == "__main__":
    main()
