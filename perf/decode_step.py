# SPDX-License-Identifier: Apache-2.0
"""Whole decode steps of a model of random weights, without an engine: what kernels are tuned by."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lightllm_backend import kernels
from lightllm_backend.kv_pool.storage import KVStorage
from lightllm_backend.models.causal_lm import model_class
from lightllm_backend.models.layers import GroupInput, KVLayer, StepInput
from lightllm_backend.models.model_config import ModelConfig
from lightllm_backend.models.weights import dummy_weights
from lightllm_backend.parallel import TensorParallel
from perf.kernels.measure import elapsed, seconds_of
from perf.shapes import SHAPES, rank_shape

DEVICE = torch.device("cuda")  # the current one: each rank has its own
DTYPE = torch.bfloat16
CONTEXT = 192  # what the static inference test has on average
# All ranks replay the graph of one step together: so many steps make one measurement, of which the median counts.
STEPS_IN_A_ROW, REPLAYS = 4, 7


class DecodeStep:
    """Steps of a shape by name and at most `most` sequences, each with CONTEXT tokens anywhere in a pool.

    With `tp`, they are the steps of one rank that need not wait for others. With the ranks of `parallel`, each in its
    own process, they are whole steps, which all ranks must time at once. `layers` takes so many of the model's only.
    """

    def __init__(
        self,
        name: str,
        most: int,
        weight_dtype: str = "auto",
        tp: int = 1,
        parallel: TensorParallel | None = None,
        layers: int | None = None,
    ) -> None:
        shape = SHAPES[name] if layers is None else SHAPES[name] | {"num_hidden_layers": layers}
        with tempfile.TemporaryDirectory() as directory:
            Path(directory, "config.json").write_text(json.dumps(rank_shape(shape, tp)))
            config = ModelConfig.from_directory(directory)
        self._parallel = parallel or TensorParallel()
        config = config.with_weight_dtype(weight_dtype, "auto", tp=self._parallel.size)
        self._model = model_class(config.architecture)(
            config, kernels.select(DEVICE), self._parallel, DTYPE, DEVICE, CONTEXT
        )
        dummy_weights(self._model, seed=0)
        slots = most * CONTEXT
        of_storage = (config.num_layers, slots, self._model.num_kv_heads, self._model.head_dim)
        self._layers = [KVLayer(*layer) for layer in KVStorage(*of_storage, DTYPE, DEVICE).layers]
        for layer in self._layers:
            layer.k.normal_()
            layer.v.normal_()
        self._table = torch.randperm(slots, device=DEVICE, dtype=torch.int32).view(most, CONTEXT)

    def input_of(self, batch: int) -> StepInput:
        def full(value: int, count: int = batch) -> Tensor:
            return torch.full((count,), value, dtype=torch.int32, device=DEVICE)

        rows = torch.arange(batch, dtype=torch.int32, device=DEVICE)
        return StepInput(
            input_ids=rows,
            positions=full(CONTEXT - 1),
            rotary_lengths=full(CONTEXT),
            rows=rows,
            context_lengths=full(CONTEXT),
            query_starts=full(0, 1),
            num_decodes=batch,
            max_context_length=CONTEXT,
            last_tokens=None,
            groups=[GroupInput(self._table[:batch, -1].contiguous(), self._table)],
            kv_layers=self._layers,
        )

    def of(self, batch: int) -> Callable[[], Tensor]:
        """The step of so many sequences, to be called under inference mode; returns logits."""
        step = self.input_of(batch)
        return lambda: self._model.forward(step)

    @torch.inference_mode()
    def seconds(self, batches: Sequence[int]) -> list[float]:
        """By the GPU's clock, in a CUDA graph, without what holds it back after a second; of the slowest rank."""
        if self._parallel.size == 1:
            return [seconds_of([self.of(batch)]) for batch in batches]
        return [self._seconds_together(self.of(batch)) for batch in batches]

    def _seconds_together(self, step: Callable[[], Tensor]) -> float:
        """Every rank replays as often as the others, for they wait for each other."""
        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        graph.replay()
        times = [
            elapsed(lambda: [graph.replay() for _ in range(STEPS_IN_A_ROW)], before=graph.replay)
            for _ in range(REPLAYS)
        ]
        nanoseconds = round(1e9 * statistics.median(times) / STEPS_IN_A_ROW)
        return -self._parallel.minimum(-nanoseconds, DEVICE) / 1e9
