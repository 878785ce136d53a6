# SPDX-License-Identifier: Apache-2.0
"""Warm-up: runs steps before any request, to compile and load all kernels and to measure the workspace."""

from __future__ import annotations

import gc
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from lightllm_backend.request import MAX_TOP_LOG_PROBS, SamplingParams
from lightllm_backend.router.batch import Admission, Batch, ScoredChunk
from lightllm_backend.runner.model_runner import ModelRunner
from lightllm_backend.runner.step_arrays import Bucket

# The prompt length of steps in which only the number of tokens matters: just too long for any graph, since the time of
# attention grows with its square.
_PROMPT_TOKENS = 2048

_GREEDY = SamplingParams()
_DRAWN = SamplingParams(do_sample=True, temperature=0.7)
_PENALISED = SamplingParams(repetition_penalty=1.1, min_tokens=1)
_MASKED = SamplingParams(allowed_token_ids=(0,))
_DRAWN_MASKED = SamplingParams(do_sample=True, temperature=0.7, allowed_token_ids=(0,))
_BIASED = SamplingParams(logit_bias=((0, 1.0),))
_WITH_LOG_PROBS = SamplingParams(return_log_probs=True, top_logprobs=1)
# Uses every part of the sampler.
_EVERYTHING = SamplingParams(
    do_sample=True,
    temperature=0.7,
    top_p=0.9,
    top_k=50,
    min_p=0.01,
    presence_penalty=0.1,
    frequency_penalty=0.1,
    repetition_penalty=1.1,
    min_tokens=1,
    allowed_token_ids=(0,),
    logit_bias=((0, 1.0),),
    return_log_probs=True,
    top_logprobs=20,
)


def worst_batches(num_rows: int, max_input: int, batch_max_tokens: int) -> list[Batch]:
    """The batches that need the most workspace: the most decodes beside the most prompt tokens."""
    num_prefills = min(max(1, batch_max_tokens // max_input), num_rows)
    prompts = [min(max_input, batch_max_tokens)] * num_prefills
    decodes = num_rows - num_prefills
    batches = [example_batch(decodes, prompts, sampling) for sampling in (_GREEDY, _EVERYTHING)]
    scored = tuple(ScoredChunk(decodes + index, length - 1, MAX_TOP_LOG_PROBS) for index, length in enumerate(prompts))
    return [*batches, replace(batches[0], scored=scored)]


def compile_kernels(runner: ModelRunner, max_input: int, batch_max_tokens: int, buckets: Sequence[Bucket]) -> None:
    """Compile the kernels of all steps in parallel. A kernel that this misses is compiled at its first launch.

    The runner is useless afterwards, since its kernels did not run.
    """
    # Not at the top: it imports Triton-lang, which an engine on a CPU does without.
    from lightllm_backend.runner.compile_ahead import compile_ahead

    # Powers of two are enough: the choice of kernels depends on them. A launch that compiles is slow, so not all steps.
    chosen = {(bucket.tokens, bucket.prefills > 0): bucket for bucket in buckets if bucket.tokens.bit_count() == 1}
    # Without log probabilities, which would be looked up by token ids that no kernel has written.
    sampled = replace(_EVERYTHING, return_log_probs=False, top_logprobs=0)

    def launch() -> None:
        for bucket in chosen.values():
            runner.launch_padding(bucket)
        for sampling in (sampled, _PENALISED, _MASKED, _DRAWN_MASKED):
            runner.launch(example_batch(1, [], sampling)).result()
        for batch in _attention_batches(min(max_input, batch_max_tokens)):
            runner.launch(batch).result()

    compile_ahead(launch)
    torch.cuda.empty_cache()


def compile_on_a_cpu(runner: ModelRunner) -> None:
    """Compile the kernels of steps that decode, or load what an earlier process has compiled."""
    runner.launch(example_batch(1, [], _GREEDY)).result()


def warm_up(runner: ModelRunner, num_rows: int, max_input: int, batch_max_tokens: int) -> None:
    """Run all that serving launches beside the graphs, so that no request waits for a kernel to compile or to load.

    The project's own kernels have few variants. cuBLAS and PyTorch choose theirs by size, and the driver loads each at
    its first use, so we run sizes from the smallest to the largest.
    """
    batch_sizes = _sizes(num_rows, 2.0)
    for size in batch_sizes:
        for sampling in (
            _GREEDY, _MASKED, _DRAWN, _DRAWN_MASKED, _PENALISED, _BIASED, _WITH_LOG_PROBS, _EVERYTHING,
        ):  # fmt: skip
            runner.launch(example_batch(size, [], sampling)).result()
    longest = min(max_input, batch_max_tokens)
    prompt = min(longest, _PROMPT_TOKENS)
    for tokens in _sizes(min(batch_max_tokens, num_rows * prompt), 1.25):
        prompts = [prompt] * (tokens // prompt) + [tokens % prompt] * (tokens % prompt > 0)
        runner.launch(example_batch(0, prompts, _GREEDY)).result()
    for batch in _attention_batches(longest):
        runner.launch(batch).result()
    for size in batch_sizes:
        runner.launch(example_batch(size - 1, [prompt], _GREEDY)).result()


def _attention_batches(longest: int) -> list[Batch]:
    """Prompts for all kernels of attention, which differ by the prompt's length and by whether a part is cached."""
    lengths = (1, min(512, longest), longest)
    return [example_batch(0, [max(length, cached + 1)], _GREEDY, cached) for length in lengths for cached in (0, 1)]


def _sizes(largest: int, ratio: float) -> list[int]:
    sizes = [1]
    while sizes[-1] < largest:
        sizes.append(min(largest, max(sizes[-1] + 1, int(sizes[-1] * ratio))))
    return sizes


def example_batch(decodes: int, prompts: Sequence[int], sampling: SamplingParams, cached: int = 0) -> Batch:
    """A batch of new sequences, with the first `cached` tokens of each prompt cached.

    All tokens use slot 0 of the pool in each layer group, whatever it holds: only shapes matter.
    """
    lengths = np.array([1] * decodes + [length - cached for length in prompts], np.int32)
    rows = np.arange(len(lengths), dtype=np.int32)
    starts = np.array([0] * decodes + [cached] * len(prompts), np.int32)
    admitted = tuple(Admission(row, (0,) * length, sampling) for row, length in enumerate((starts + lengths).tolist()))
    slots, samples = np.zeros((1, int(lengths.sum())), np.int32), np.ones(len(lengths), np.bool_)
    return Batch(rows, starts, lengths, slots, samples, decodes, admitted)


def workspace_bytes(
    runner_with_one_slot: ModelRunner, batches: list[Batch], buckets: list[Bucket], device: torch.device
) -> int:
    """The peak of PyTorch's GPU memory, weights included, with CUDA graphs and `batches` launched beside them.

    The graphs share the memory that the largest of `buckets` need, so we capture only these. The runner's memory is
    released.
    """
    torch.cuda.reset_peak_memory_stats(device)
    with_most_tokens = max(buckets, key=lambda bucket: bucket.tokens)
    with_most_logits = max(buckets, key=lambda bucket: bucket.samples)
    runner_with_one_slot.capture_graphs(list({with_most_tokens, with_most_logits}))
    for batch in batches:
        runner_with_one_slot.launch(batch).result()
    peak = torch.cuda.max_memory_reserved(device)
    del runner_with_one_slot
    gc.collect()
    torch.cuda.empty_cache()
    return peak


def bytes_left(mem_fraction: float, peak_bytes: int, device: torch.device, log: Callable[[str], None]) -> int:
    """The bytes left of `mem_fraction` of the GPU after the peak and the memory of other processes."""
    free, total = torch.cuda.mem_get_info(device)
    others = total - free - torch.cuda.memory_reserved(device)
    room = int(total * mem_fraction) - others - peak_bytes
    log(
        f"GPU memory: {total >> 20} MiB, of which {mem_fraction:.0%} may be used; weights and workspace"
        f" {peak_bytes >> 20} MiB, other processes {others >> 20} MiB, request tables and KV pool"
        f" {max(room, 0) >> 20} MiB"
    )
    return room


def tokens_that_fit(
    room: int, token_bytes: int, table_bytes: Callable[[int], int], max_length: int, longest: Callable[[int], int] = int
) -> int:
    """The most tokens that fit into `room` bytes beside the tables for the longest sequence of a pool for so many.

    longest: what a pool for so many tokens can hold of one sequence: so many by default. No sequence is longer than
    `max_length`, and its last token needs no place. A result below 1: none fits.
    """

    def needed(tokens: int) -> int:
        return tokens * token_bytes + table_bytes(min(max_length, longest(tokens) + 1))

    return bisect_right(range(max(room, 0) // token_bytes + 1), room, key=needed) - 1
