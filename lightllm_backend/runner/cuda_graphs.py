# SPDX-License-Identifier: Apache-2.0
"""Whole steps as CUDA graphs, one for each bucket: to launch their kernels one by one takes longer than they run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lightllm_backend.router.batch import Batch
from lightllm_backend.runner.buckets import BucketChoice
from lightllm_backend.runner.step import ForwardOutput, Step
from lightllm_backend.runner.step_arrays import EMPTY_BATCH, Bucket


@dataclass(frozen=True)
class _Capture:
    graph: torch.cuda.CUDAGraph
    inputs: Tensor  # bytes of the bucket's StepArrays, which a replay reads
    output: ForwardOutput


class CudaGraphs:
    """Owns the graphs. All of them use the same memory, since only one runs at a time."""

    def __init__(self, step: Step, buckets: Sequence[Bucket]) -> None:
        self._step = step
        self._choose = BucketChoice(buckets)
        # The largest first: the others find all the memory that they need.
        largest_first = self._choose.buckets[::-1]
        # Loads what a bucket needs, and compiles it if nobody has, which a capture may not.
        inputs = {bucket: self._warm_up(bucket) for bucket in tqdm(largest_first, "Warming up", unit="step")}
        pool = torch.cuda.graph_pool_handle()
        self._captures = {
            bucket: self._capture(bucket, inputs[bucket], pool)
            for bucket in tqdm(largest_first, "Capturing CUDA graphs", unit="graph")
        }

    def run(self, batch: Batch) -> ForwardOutput | None:
        """The step's output, which is valid until the next; None if no bucket has room for the batch."""
        bucket = self._choose(batch)
        if bucket is None:
            return None
        capture = self._captures[bucket]
        self._step.upload(batch, bucket, capture.inputs)
        capture.graph.replay()
        return capture.output

    def _warm_up(self, bucket: Bucket) -> Tensor:
        inputs = self._step.upload(EMPTY_BATCH, bucket)
        self._step.launch(inputs, bucket)
        return inputs

    def _capture(self, bucket: Bucket, inputs: Tensor, pool: Any) -> _Capture:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            logits, token_ids, places = self._step.launch(inputs, bucket)
        return _Capture(graph, inputs, ForwardOutput(_without_owner(logits), _without_owner(token_ids), places))


class _Memory:
    """What `torch.as_tensor` makes a tensor of that does not keep the memory from the next graphs."""

    def __init__(self, tensor: Tensor) -> None:
        # As integers: the interface does not know bfloat16.
        size = tensor.element_size()
        self.__cuda_array_interface__ = {
            "version": 3,
            "data": (tensor.data_ptr(), False),
            "shape": tuple(tensor.shape),
            "strides": tuple(size * stride for stride in tensor.stride()),
            "typestr": f"<i{size}",
        }


def _without_owner(tensor: Tensor) -> Tensor:
    """The same tensor, in memory that the graphs' pool may use for others: else each graph's logits would
    take memory of their own."""
    return torch.as_tensor(_Memory(tensor), device=tensor.device).view(tensor.dtype)
