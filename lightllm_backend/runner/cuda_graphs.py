# SPDX-License-Identifier: Apache-2.0
"""CudaGraphs: whole steps as CUDA graphs, one per bucket. Small steps take longer to launch than to run."""

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
    inputs: Tensor  # the bytes of the bucket's StepArrays, which a replay reads
    output: ForwardOutput


class CudaGraphs:
    """Owns the graphs. They share one memory pool, since only one runs at a time."""

    def __init__(self, step: Step, buckets: Sequence[Bucket]) -> None:
        self._step = step
        self._choose = BucketChoice(buckets)
        # The largest first: the smaller ones then fit into its memory.
        largest_first = self._choose.buckets[::-1]
        # Compiles and loads each bucket's kernels, which is not allowed during a capture.
        inputs = {bucket: self._warm_up(bucket) for bucket in tqdm(largest_first, "Warming up", unit="step")}
        pool = torch.cuda.graph_pool_handle()
        self._captures = {
            bucket: self._capture(bucket, inputs[bucket], pool)
            for bucket in tqdm(largest_first, "Capturing CUDA graphs", unit="graph")
        }

    def run(self, batch: Batch) -> ForwardOutput | None:
        """Run the batch and return the output, which is valid until the next run; None if no bucket fits the batch."""
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
            logits, token_ids, indices, _ = self._step.launch(inputs, bucket)
        return _Capture(graph, inputs, ForwardOutput(_without_owner(logits), _without_owner(token_ids), indices))


class _Memory:
    """A view of a tensor's memory, by address, that does not keep the memory allocated."""

    def __init__(self, tensor: Tensor) -> None:
        # As integers, since the interface does not know bfloat16.
        size = tensor.element_size()
        self.__cuda_array_interface__ = {
            "version": 3,
            "data": (tensor.data_ptr(), False),
            "shape": tuple(tensor.shape),
            "strides": tuple(size * stride for stride in tensor.stride()),
            "typestr": f"<i{size}",
        }


def _without_owner(tensor: Tensor) -> Tensor:
    """The same tensor without ownership: the graphs' pool may reuse its memory.

    Otherwise each graph's logits would occupy memory of their own.
    """
    return torch.as_tensor(_Memory(tensor), device=tensor.device).view(tensor.dtype)
