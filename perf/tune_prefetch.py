# SPDX-License-Identifier: Apache-2.0
"""Finds the small-batch products that linear_prefetch makes quicker, and its best tiles for them, and stores both.

    python -m perf.tune_prefetch
    python -m perf.tune_prefetch --tokens 32,64 llama-7b
    python -m perf.tune_prefetch --tp 2 llama-7b

It times whole decode steps of a model of random weights in a CUDA graph, since the kernel's gain lies between
products: timed alone, it would be chosen too often. With --tp, the steps run on as many GPUs, one process each: what
a product gains while ranks wait for each other counts too. Product after product, it tries all blocks that fit the
shared memory, and keeps the best if it makes the step quicker. The result goes to
lightllm_backend/kernels/linear/linear_prefetch.json, where other products and token counts keep what earlier runs
found. Products that models share are tuned with the first of these models.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Iterator
from typing import Any

import click
import torch
from torch import Tensor
from tqdm import tqdm
from triton.runtime.errors import OutOfResources

from lightllm_backend.config import EngineConfig
from lightllm_backend.generation.worker_group import worker_environment
from lightllm_backend.kernels import reference
from lightllm_backend.kernels.linear.choice import (
    PREFETCH_BLOCKS,
    Choice,
    LinearBlocks,
    ProductKernel,
    product_name,
    stored_blocks,
)
from lightllm_backend.kernels.linear.gated_linear import launch_gated
from lightllm_backend.kernels.linear.linear_prefetch import registers_of
from lightllm_backend.kernels.linear.linear_splits import launch_product
from lightllm_backend.parallel import TensorParallel
from lightllm_backend.runner.compile_ahead import compile_ahead
from perf.decode_step import DEVICE, DTYPE, DecodeStep
from perf.shapes import SHAPES
from perf.tune_linear import Product, capability, products, store

# The batches whose steps are timed for each token count; none may become slower.
BATCHES = {16: (1, 8), 32: (32,), 64: (64,), 128: (128,), 256: (256,)}
# A step must become faster by this share, the precision of the measurement.
MARGIN = 0.002
# How far results may differ from PyTorch's.
TOLERANCE = 0.01
# Shared memory of a multiprocessor, less what barriers and the system take.
SHARED_BYTES = 222_000
# Fewer cannot keep as many reads in flight as memory takes.
MIN_PROGRAMS = 60


def candidates(product: Product, tokens: int) -> Iterator[LinearBlocks]:
    for (rows, warps), inner, beside, splits in itertools.product(
        ((64, 4), (128, 4), (128, 8), (256, 8)), (64, 128), (1, 2, 3), (1, 2, 4)
    ):
        programs = product.out_features // rows * splits
        # The result is rearranged in shared memory too.
        free = SHARED_BYTES // beside - 8_000 - 5 * rows * tokens // 2
        stages = min(16, free // (2 * inner * (rows + tokens)))
        if (
            stages >= 3
            and product.in_features % (splits * inner) == 0
            and programs >= MIN_PROGRAMS
            and (splits == 1 or (programs <= 270 and not product.is_gated))
        ):
            blocks = LinearBlocks(rows, inner, stages, warps, splits, beside)
            # Registers for the result, and 40 for the rest.
            if rows * tokens // (32 * warps) + 40 <= registers_of(blocks):
                yield blocks


def compiled(product: Product, tokens: int, parallel: TensorParallel) -> list[LinearBlocks]:
    """The candidates that the GPU has room for, after checking their results. Rank 0 compiles for all."""
    x = torch.randn(tokens, product.in_features, device=DEVICE, dtype=DTYPE)
    weight = torch.randn(product.out_features, product.in_features, device=DEVICE, dtype=DTYPE)
    weight /= product.in_features**0.5
    expected = (reference.gated_linear if product.is_gated else reference.linear)(x, weight).float()

    def run(blocks: LinearBlocks) -> Tensor | None:
        choice = Choice(ProductKernel.PREFETCH, blocks)
        try:
            if product.is_gated:
                result = torch.empty_like(expected, dtype=DTYPE)
                launch_gated(x, weight, None, result, choice)
                return result
            parts = x.new_empty(blocks.splits, *expected.shape, dtype=DTYPE if blocks.splits == 1 else torch.float32)
            launch_product(x, weight, None, parts, choice)
        except OutOfResources:
            return None
        return parts.float().sum(0)

    tried = list(candidates(product, tokens))
    if parallel.rank > 0:
        parallel.minimum(0, DEVICE)
    compile_ahead(lambda: [run(blocks) for blocks in tried])
    if parallel.rank == 0:
        parallel.minimum(0, DEVICE)
    found = {blocks: result for blocks in tried if (result := run(blocks)) is not None}
    for blocks, result in found.items():
        error = float((result.float() - expected).norm() / expected.norm())
        assert error < TOLERANCE, f"{product}, {tokens} tokens, {blocks}: {error}"
    return list(found)


def tune(
    step: DecodeStep, of_model: list[Product], tokens: int, table: dict[str, Any], parallel: TensorParallel
) -> None:
    """Tune one token count; changes `table`, which the launchers read, in place. All ranks see the same times."""
    rows = {product: table.setdefault(product_name(*product[:3]), {}) for product in of_model}
    for row in rows.values():
        row.pop(str(tokens), None)
    before = best = step.seconds(BATCHES[tokens])
    # Two passes: a product left unchanged in the first may gain once those after it have changed.
    for _ in range(2):
        for product, row in rows.items():
            if str(tokens) in row:
                continue
            label = f"{product_name(*product[:3])}, {tokens} tokens"
            kept, limit = None, 1 - MARGIN
            for blocks in tqdm(compiled(product, tokens, parallel), label, unit="blocks", disable=None):
                row[str(tokens)] = list(blocks)
                seconds = step.seconds(BATCHES[tokens])
                ratios = [one / other for one, other in zip(seconds, best, strict=True)]
                if sum(ratios) < limit * len(ratios) and max(ratios) < 1 + MARGIN / 2:
                    best, kept, limit = seconds, blocks, 1.0
            row.pop(str(tokens), None)
            if kept:
                row[str(tokens)] = list(kept)
            if parallel.rank == 0:
                print(f"{label}: {kept}, step {_milliseconds(best)}", flush=True)
    if parallel.rank == 0:
        print(f"{tokens} tokens: {_milliseconds(before)} -> {_milliseconds(best)}", flush=True)


def _milliseconds(seconds: list[float]) -> str:
    return f"{' / '.join(f'{1e3 * one:.3f}' for one in seconds)} ms"


def run_rank(rank: int, models: tuple[str, ...], tokens: str, tp: int, meeting: str) -> None:
    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    ranks = TensorParallel.connect(rank, tp, device, meeting)
    table = stored_blocks(PREFETCH_BLOCKS).setdefault(capability(), {})
    done: set[Product] = set()
    for name in models or ("llama-7b", "llama-3-8b", "bloom-7b1", "llama-13b"):
        counts = [int(count) for count in tokens.split(",")]
        most = max(itertools.chain(*(BATCHES[count] for count in counts)))
        parallel = ranks.with_symmetric_memory(most, SHAPES[name]["hidden_size"], DTYPE, device)
        step = DecodeStep(name, most, parallel=parallel)
        new = [product for product in products(SHAPES[name], tp) if product not in done]
        for count in counts:
            tune(step, new, count, table, parallel)
            if rank == 0:
                store(PREFETCH_BLOCKS, table, tokens)
        done.update(new)
        del step
        torch.cuda.empty_cache()


@click.command(help=str(__doc__).partition("\n")[0])
@click.argument("models", nargs=-1, type=click.Choice(list(SHAPES)))
@click.option("--tokens", default="16,32,64,128", show_default=True, help="blocks of tokens")
@click.option("--tp", default=1, show_default=True, type=click.IntRange(min=1), help="GPUs: tune a rank's products")
def main(models: tuple[str, ...], tokens: str, tp: int) -> None:
    if tp == 1:
        run_rank(0, models, tokens, tp, "")
        return
    os.environ.update(worker_environment(EngineConfig()))
    with tempfile.TemporaryDirectory() as directory:
        arguments = (models, tokens, tp, f"{directory}/ranks")
        torch.multiprocessing.spawn(run_rank, arguments, nprocs=tp)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
