# SPDX-License-Identifier: Apache-2.0
"""The worst step there can be, run once before the pool is allocated: finds the workspace, compiles the kernels."""

from __future__ import annotations

import gc
from collections.abc import Callable

import numpy as np
import torch

from lightllm_backend.request import SamplingParams
from lightllm_backend.router.batch import Admission, Batch
from lightllm_backend.runner.model_runner import ModelRunner

# Every part of the sampler takes part.
_EVERYTHING = SamplingParams(
    do_sample=True, temperature=0.7, top_p=0.9, top_k=50, presence_penalty=0.1, frequency_penalty=0.1,
    repetition_penalty=1.1, min_tokens=1, return_log_probs=True,
)  # fmt: skip


def worst_batches(num_rows: int, max_input: int, max_total: int, batch_max_tokens: int) -> list[Batch]:
    """The most decodes at the greatest length with the most prompt tokens beside them; greedy, and with everything.

    All tokens use slot 0 of the pool, whatever lies there: only shapes count.
    """
    num_prefills = min(max(1, batch_max_tokens // max_input), num_rows)
    num_decodes = num_rows - num_prefills
    chunk = min(max_input, batch_max_tokens)
    lengths = np.concatenate([np.ones(num_decodes, np.int32), np.full(num_prefills, chunk, np.int32)])
    starts = np.concatenate([np.full(num_decodes, max_total - 2, np.int32), np.zeros(num_prefills, np.int32)])
    rows = np.arange(num_rows, dtype=np.int32)
    batches = []
    for sampling in (SamplingParams(), _EVERYTHING):
        admitted = tuple(Admission(int(row), (0,) * chunk, sampling) for row in rows)
        slots, samples = np.zeros(int(lengths.sum()), np.int32), np.ones(num_rows, bool)
        batches.append(Batch(rows, starts, lengths, slots, samples, num_decodes, admitted))
    return batches


def workspace_bytes(
    runner_with_one_slot: ModelRunner, batches: list[Batch], largest_graph: int, device: torch.device
) -> int:
    """Peak of the GPU memory that PyTorch holds, weights included: while the batches run, with CUDA graphs beside them.

    All graphs share the memory that the largest needs. What the runner held is given back.
    """
    torch.cuda.reset_peak_memory_stats(device)
    for batch in batches:
        runner_with_one_slot.launch(batch).result()
    runner_with_one_slot.capture_graphs([largest_graph])
    peak = torch.cuda.max_memory_reserved(device)
    del runner_with_one_slot
    gc.collect()
    torch.cuda.empty_cache()
    return peak


def tokens_that_fit(
    slot_bytes: int, mem_fraction: float, peak_bytes: int, device: torch.device, log: Callable[[str], None]
) -> int:
    """Token slots for the rest of `mem_fraction` of the GPU, beside the peak and what others hold."""
    free, total = torch.cuda.mem_get_info(device)
    others = total - free - torch.cuda.memory_reserved(device)
    room = int(total * mem_fraction) - others - peak_bytes
    log(
        f"GPU memory: {total >> 20} MiB, of which {mem_fraction:.0%} may be used; weights and workspace"
        f" {peak_bytes >> 20} MiB, other processes {others >> 20} MiB, KV pool {max(room, 0) >> 20} MiB"
    )
    return room // slot_bytes
