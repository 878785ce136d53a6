# SPDX-License-Identifier: Apache-2.0
"""Whole decode steps of a model of random weights, without an engine: what kernels are tuned by."""

from __future__ import annotations

import json
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
from perf.kernels.measure import seconds_of
from perf.shapes import SHAPES, rank_shape

DEVICE = torch.device("cuda", 0)
DTYPE = torch.bfloat16
CONTEXT = 192  # what the static inference test has on average


class DecodeStep:
    """Steps of a shape by name and at most `most` sequences, each with CONTEXT tokens anywhere in a pool.

    With several ranks, the steps are those of one, without waiting for the others.
    """

    def __init__(self, name: str, most: int, weight_dtype: str = "auto", tp: int = 1) -> None:
        with tempfile.TemporaryDirectory() as directory:
            Path(directory, "config.json").write_text(json.dumps(rank_shape(SHAPES[name], tp)))
            config = ModelConfig.from_directory(directory).with_weight_dtype(weight_dtype, "auto", tp=1)
        parallel = TensorParallel.connect(0, 1, DEVICE, "")
        self._model = model_class(config.architecture)(config, kernels.select(DEVICE), parallel, DTYPE, DEVICE, CONTEXT)
        dummy_weights(self._model, seed=0)
        slots = most * CONTEXT
        shape = (config.num_layers, slots, self._model.num_kv_heads, self._model.head_dim)
        self._layers = [KVLayer(*layer) for layer in KVStorage(*shape, DTYPE, DEVICE).layers]
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
        """By the GPU's clock, in a CUDA graph, without what holds it back after a second."""
        return [seconds_of([self.of(batch)]) for batch in batches]
