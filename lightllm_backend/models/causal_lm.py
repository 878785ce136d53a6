# SPDX-License-Identifier: Apache-2.0
"""CausalLM: the interface that the runner and the loader ask of a model, and the class for an architecture."""

from __future__ import annotations

import importlib
from typing import Protocol

import torch
from torch import Tensor

from lightllm_backend.kernels.interface import Kernels
from lightllm_backend.models.layers import HiddenStates, StepInput
from lightllm_backend.models.model_config import ModelConfig
from lightllm_backend.models.registry import ARCHITECTURES, check_architecture
from lightllm_backend.models.weights import HasWeights
from lightllm_backend.parallel import TensorParallel


class CausalLM(HasWeights, Protocol):
    """One rank's part of a model."""

    num_kv_heads: int  # on this rank
    head_dim: int
    exceeds_float16: bool  # its activations do: they become infinite, and then NaN

    def __init__(
        self,
        config: ModelConfig,
        kernels: Kernels,
        parallel: TensorParallel,
        dtype: torch.dtype,
        device: torch.device,
        max_length: int,
    ) -> None:
        """Allocate the parameters; load_weights or dummy_weights fills them."""

    @property
    def windows(self) -> list[int]:
        """The positions that a query sees in each layer, its own included; 0: all."""

    def forward(self, step: StepInput) -> Tensor:
        """Write the new K and V into the pool and return the logits [m, vocab] of `step.last_tokens`."""

    def hidden_states(self, step: StepInput) -> HiddenStates:
        """The first half of `forward`: write the new K and V, and return the hidden states of all tokens."""

    def logits(self, hidden_states: HiddenStates, tokens: Tensor | None) -> Tensor:
        """The second half: the logits [m, vocab] of these tokens [m] int64, or of all, in order.

        May be called again unless `tokens` is None, which changes the hidden states.
        """


def model_class(architecture: str) -> type[CausalLM]:
    """Import and return the class of an architecture."""
    check_architecture(architecture)
    module = importlib.import_module(f"lightllm_backend.models.{ARCHITECTURES[architecture].module}")
    found: type[CausalLM] = getattr(module, architecture)
    return found
