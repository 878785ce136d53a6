# SPDX-License-Identifier: Apache-2.0
"""Finds the best blocks of quantized_prefetch for each product with a weight of 4 or 8 bits, and stores them.

    python -m perf.tune_quantized
    python -m perf.tune_quantized --kinds int4 --tokens 8,16 llama-7b
    python -m perf.tune_quantized --kinds fp8 --tp 4 llama-7b llama-2-70b

"fp8 by fp8" is fp8 with activations rounded to 8 bits, as they are from some number of tokens on; "by pairs", with
activations as pairs of 8-bit numbers, which norms make of few tokens. All blocks that fit
are compiled, checked and timed in a CUDA graph, each product behind the norm that writes its input, since a part of the
gain lies between the two. Then whole decode steps decide between the best of each product. The result goes to
lightllm_backend/kernels/quantized/quantized_prefetch.json, where other products and token counts keep what earlier runs
found.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import click
import torch
from torch import Tensor
from tqdm import tqdm
from triton.runtime.errors import OutOfResources, PTXASError

from lightllm_backend.kernels import launchers, reference
from lightllm_backend.kernels.linear.choice import product_name, stored_blocks
from lightllm_backend.kernels.norm.rms_norm import paired_rms_norm, rounded_rms_norm
from lightllm_backend.kernels.quantized.choice import (
    BLOCKS,
    MAX_16_BIT_ROUNDED,
    MAX_BLOCK_TOKENS,
    MOST_BLOCK_TOKENS,
    PAIRED_TOKENS,
    PREFETCH_TOKENS,
    PrefetchBlocks,
    most_stages,
    row_tiles_of,
)
from lightllm_backend.kernels.quantized.fragments import into_fragments
from lightllm_backend.kernels.quantized.prefetch_plan import registers_of
from lightllm_backend.kernels.quantized.quantized_prefetch import launch_quantized_prefetch
from lightllm_backend.kernels.quantized.weight import QuantizedWeight
from perf.decode_step import DEVICE, DTYPE, DecodeStep
from perf.kernels import measure
from perf.kernels.measure import Place
from perf.kernels.quantized import random_weight
from perf.shapes import SHAPES
from perf.tune_linear import Product, capability, products, store

TOKENS = (4, *PREFETCH_TOKENS)
BATCHES = {4: (1, 4), 8: (1, 8), 16: (16,), 32: (32,), 64: (64,), 128: (128,), 256: (256,)}
# How many blocks of a product the whole step chooses from.
FINALISTS = 4
# Columns that the whole step may ask for early, with the best of those.
FETCHED = (256, 512, 1024)
TOLERANCE = {True: 0.06, False: 0.01}  # of results, with activations of 8 bits and without


class Job(NamedTuple):
    kind: str
    product: Product
    tokens: int

    @property
    def rounds(self) -> bool:
        """Whether activations have 8 bits."""
        return self.kind == "fp8 by fp8"

    @property
    def is_paired(self) -> bool:
        """Whether they are pairs of 8-bit numbers, which norms make."""
        return self.kind.endswith(" by pairs")

    @property
    def is_made(self) -> bool:
        """Whether products of so many tokens have such activations."""
        if self.is_paired:
            return self.tokens in PAIRED_TOKENS[self.kind.partition(" ")[0]] and not self.product.norm_sums_parts
        return self.tokens in PREFETCH_TOKENS and (self.tokens > MAX_16_BIT_ROUNDED or not self.rounds)


def weight_of(kind: str, product: Product) -> QuantizedWeight:
    """As `weight_dtype` makes it, with results of about 1."""
    kind = kind.partition(" ")[0]
    weight = random_weight(Place(DEVICE, DTYPE), kind, product.out_features, product.in_features)
    spread = {"int4": 4.6, "int8": 73.0, "fp8": 1.0}[kind]
    scales = weight.scales / (spread * product.in_features**0.5)
    return into_fragments(replace(weight, scales=scales, zeros=None))


def _without_data(kind: str, out_features: int, in_features: int) -> QuantizedWeight:
    place, kind = Place(torch.device("meta"), DTYPE), kind.partition(" ")[0]
    return replace(random_weight(place, kind, out_features, in_features), zeros=None, quantizes_input=kind == "fp8")


def candidates(job: Job) -> Iterator[PrefetchBlocks]:
    kind, product, tokens = job
    shape = _without_data(kind, product.out_features, product.in_features)
    for (rows, warps, consumers), inner, beside, splits, most_tokens in itertools.product(
        ((64, 4, 1), (64, 4, 2), (128, 4, 1), (128, 4, 2), (128, 8, 1), (192, 4, 1), (256, 8, 1), (256, 16, 1)),
        (128, 256) if product.in_features % 128 == 0 else (64,),
        (1, 2, 3),
        (1, 2, 3, 4, 6),
        (MAX_BLOCK_TOKENS, MOST_BLOCK_TOKENS) if tokens > MAX_BLOCK_TOKENS else (MAX_BLOCK_TOKENS,),
    ):
        block_tokens = min(tokens, most_tokens)
        programs = math.ceil(product.out_features / rows) * splits * math.ceil(tokens / most_tokens)
        steps = product.in_features // inner
        blocks = PrefetchBlocks(rows, inner, 1, warps, consumers, splits, beside, most_tokens)
        blocks = blocks._replace(stages=most_stages(blocks, tokens, shape, product.is_gated, job.rounds))
        if (
            blocks.stages < 2 * consumers
            or product.in_features % inner != 0
            or (splits - 1) * math.ceil(steps / splits) + consumers > steps
            or programs < 60
            or (splits > 1 and (programs > 132 * beside * 1.05 or product.is_gated))
            or (beside > 1 and programs <= 132 * (beside - 1))
            or (rows == 256 and tokens < 32)
            or (rows == 64 and block_tokens > 128)
            or (row_tiles_of(blocks) > 1 and (block_tokens > 128 or beside > 1 or not (job.rounds or tokens > 64)))
            or consumers * warps * beside > 24
        ):
            continue
        # Registers for the result, for two spans of weights and the words of a tile, and for the rest. ptxas wants room
        # for an instruction's part of the result in the registers that threads start with.
        most, of_consumers = registers_of(blocks)
        of_weights = 0 if job.rounds or kind == "fp8 by pairs" else rows * 96 // (32 * warps)
        columns = block_tokens * {"int4 by pairs": 4, "fp8 by pairs": 2}.get(kind, 1)  # int4's sums of a group, and all
        needed = rows // row_tiles_of(blocks) * columns // (32 * warps) + of_weights + 36
        if needed <= of_consumers and block_tokens // 2 + 32 <= most:
            yield blocks


def result_of(job: Job, blocks: PrefetchBlocks, x: Tensor, scales: Tensor | None, weight: QuantizedWeight) -> Tensor:
    product = job.product
    features = product.out_features // (2 if product.is_gated else 1)
    out = torch.empty(blocks.splits, job.tokens, features, device=DEVICE, dtype=DTYPE)
    launch_quantized_prefetch(x, scales, weight, None, out, blocks, product.is_gated, is_paired=job.is_paired)
    if blocks.splits > 1 and not product.norm_sums_parts:
        return launchers.sum_splits(out, torch.empty_like(out[0], dtype=DTYPE)).unsqueeze(0)
    return out


def inputs(job: Job, weight: QuantizedWeight, raw: Tensor, scale: Tensor) -> tuple[Tensor, Tensor | None]:
    """The product's, by the norm before it."""
    if job.rounds or job.is_paired:
        made = (paired_rms_norm if job.is_paired else rounded_rms_norm)(raw, scale, 1e-5, None, None, weight)
        return made.values, made.scales
    return launchers.rms_norm(raw, scale, 1e-5), None


def try_some(jobs: Sequence[tuple[Job, PrefetchBlocks]]) -> int:
    """Fill Triton-lang's cache, in a process of its own; return how many kernels ran until one failed."""
    cached_weight = lru_cache(1)(weight_of)
    for index, (job, blocks) in enumerate(jobs):
        weight = cached_weight(job.kind, job.product)
        raw = torch.randn(job.tokens, job.product.in_features, device=DEVICE, dtype=DTYPE)
        try:
            result_of(job, blocks, *inputs(job, weight, raw, torch.ones_like(raw[0])), weight)
            torch.cuda.synchronize()
        except OutOfResources:
            pass
        except PTXASError:
            pass
        except RuntimeError as error:
            print(f"FAILED {job}, {tuple(blocks)}: {str(error).splitlines()[0]}", flush=True)
            return index
    return len(jobs)


def runnable(pairs: list[tuple[Job, PrefetchBlocks]]) -> set[tuple[Job, PrefetchBlocks]]:
    """Those whose kernels compile and run. A failure ends its process's use of the GPU."""
    failed = set()
    context, workers = multiprocessing.get_context("spawn"), max(1, len(os.sched_getaffinity(0)) - 1)
    size = max(1, min(40, math.ceil(len(pairs) / workers)))
    chunks = [pairs[i : i + size] for i in range(0, len(pairs), size)]
    with context.Pool(workers, maxtasksperchild=1) as pool:
        while chunks:
            ran = pool.map(try_some, chunks, chunksize=1)
            failed |= {chunk[count] for chunk, count in zip(chunks, ran, strict=True) if count < len(chunk)}
            chunks = [chunk[count + 1 :] for chunk, count in zip(chunks, ran, strict=True) if count + 1 < len(chunk)]
    return set(pairs) - failed


def times(job: Job, tried: Sequence[PrefetchBlocks]) -> dict[PrefetchBlocks, float]:
    """Seconds of a norm and the product, for all blocks that fit and are right."""
    weight = weight_of(job.kind, job.product)
    share = weight.values.nbytes
    weights = [weight] + [
        weight_of(job.kind, job.product) for _ in range(min(24, math.ceil(measure.ROTATED_BYTES / share)) - 1)
    ]
    raws = [torch.randn(job.tokens, job.product.in_features, device=DEVICE, dtype=DTYPE) for _ in weights]
    scale = torch.ones_like(raws[0][0])
    plain = reference.gated_linear if job.product.is_gated else reference.linear
    x, scales = inputs(job, weight, raws[0], scale)
    rounded = replace(weight, quantizes_input=job.rounds)
    expected = plain(launchers.rms_norm(raws[0], scale, 1e-5).float(), rounded)
    found = {}
    for blocks in tried:
        try:
            result = result_of(job, blocks, x, scales, weight).float().sum(0)
        except (OutOfResources, PTXASError):
            continue
        error = float((result - expected).norm() / expected.norm())
        if not error < TOLERANCE[job.rounds]:
            print(f"WRONG {job}, {blocks}: {error}", flush=True)
            continue

        def call(i: int, blocks: PrefetchBlocks = blocks) -> Any:
            return lambda: result_of(job, blocks, *inputs(job, weights[i], raws[i], scale), weights[i])

        found[blocks] = measure.seconds_of([call(i) for i in range(len(weights))])
    return found


def key(job: Job) -> str:
    return f"{job.kind}, {product_name(*job.product[:3])}"


@click.command(help=str(__doc__).partition("\n")[0])
@click.argument("models", nargs=-1, type=click.Choice(list(SHAPES)))
@click.option("--kinds", default="fp8,fp8 by fp8,fp8 by pairs,int4,int4 by pairs", show_default=True)
@click.option("--tokens", default=",".join(map(str, TOKENS)), show_default=True, help="blocks of tokens")
@click.option("--compare", is_flag=True, help="also time the steps in 16 bits")
@click.option("--tp", default=1, show_default=True, type=click.IntRange(min=1), help="GPUs: tune a rank's products")
@torch.inference_mode()
def main(models: tuple[str, ...], kinds: str, tokens: str, compare: bool, tp: int) -> None:
    began = time.monotonic()
    table = stored_blocks(BLOCKS).setdefault(capability(), {})
    counts = [int(count) for count in tokens.split(",")]
    measure.GRAPH_SECONDS, measure.REPLAYS = 2e-3, 5
    for name in models or ("llama-7b",):
        new = products(SHAPES[name], tp)[:4]  # the head is another option's
        jobs = [Job(kind, product, count) for kind in kinds.split(",") for product in new for count in counts]
        jobs = [job for job in jobs if job.is_made]
        pairs = [(job, blocks) for job in jobs for blocks in candidates(job)]
        print(f"{len(pairs)} kernels", flush=True)
        sound = runnable(pairs)
        print(f"{time.monotonic() - began:.0f} s: compiled", flush=True)
        finalists: dict[Job, list[PrefetchBlocks]] = {}
        for job in tqdm(jobs, disable=None):
            found = times(job, [blocks for blocks in candidates(job) if (job, blocks) in sound])
            order = sorted(found, key=found.__getitem__)
            finalists[job] = order[:FINALISTS]
            best = ", ".join(f"{tuple(blocks)} {1e6 * found[blocks]:.1f}" for blocks in order[:5])
            print(f"{key(job)}, {job.tokens}: {best}", flush=True)
            if order:
                table.setdefault(key(job), {})[str(job.tokens)] = list(order[0])
        print(f"{time.monotonic() - began:.0f} s: products timed", flush=True)
        torch.cuda.empty_cache()
        most = max(max(BATCHES[count]) for count in counts)
        bf16: dict[int, list[float]] = {}
        if compare:
            step = DecodeStep(name, most, tp=tp)
            bf16 = {count: step.seconds(BATCHES[count]) for count in counts}
            milliseconds = {count: [round(1e3 * one, 3) for one in bf16[count]] for count in counts}
            print(f"bf16, {milliseconds}", flush=True)
            del step
        for kind in kinds.split(","):
            step = DecodeStep(name, most, kind.partition(" ")[0], tp)
            for count in counts:
                of_step = [job for job in jobs if job.kind == kind and job.tokens == count]
                if not of_step:
                    continue
                best = sum(step.seconds(BATCHES[count]))
                for job in of_step:
                    row = table[key(job)]
                    kept = row[str(count)]
                    further = [blocks._replace(fetched=columns) for blocks in finalists[job][:1] for columns in FETCHED]
                    for blocks in finalists[job][1:] + further:
                        row[str(count)] = list(blocks)
                        seconds = sum(step.seconds(BATCHES[count]))
                        if seconds < best:
                            best, kept = seconds, list(blocks)
                    row[str(count)] = kept
                seconds = step.seconds(BATCHES[count])
                ratio = [f"{one / other:.3f}" for one, other in zip(seconds, bf16.get(count, []), strict=False)]
                print(
                    f"{kind}, batches {BATCHES[count]}: {[round(1e3 * one, 3) for one in seconds]} ms, x bf16 {ratio}",
                    flush=True,
                )
            del step
            torch.cuda.empty_cache()
        print(f"{time.monotonic() - began:.0f} s: {name} done", flush=True)
        store(BLOCKS, table, f"{name}, {kinds}: {tokens}")


if __name__ == "__main__":
    main()
