# SPDX-License-Identifier: Apache-2.0
"""Granite: LLaMA with multipliers of embeddings, of scores, of what is added to the residual, and of logits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from lightllm_backend.kernels.quantized.rounded_tokens import Activations
from lightllm_backend.kernels.quantized.weight import Weight
from lightllm_backend.models.decoder import MLP, SelfAttention
from lightllm_backend.models.layers import HiddenStates
from lightllm_backend.models.llama import LlamaForCausalLM
from lightllm_backend.models.model_config import ModelConfig
from lightllm_backend.models.weights import WeightSlot


@dataclass(frozen=True)
class Scaled:
    """Attention or an MLP, and what its output is multiplied by."""

    part: SelfAttention | MLP
    factor: float

    @property
    def reader(self) -> Weight:
        return self.part.reader

    def __call__(self, x: Activations, *others: Any, **named: Any) -> Tensor:
        return self.part(x, *others, **named).mul_(self.factor)

    def weight_map(self) -> dict[str, WeightSlot]:
        return self.part.weight_map()


class GraniteForCausalLM(LlamaForCausalLM):
    """Granite."""

    def __init__(self, config: ModelConfig, *others: Any) -> None:
        super().__init__(config, *others)
        self.embedding_multiplier, self.logit_divisor = config.embedding_multiplier, config.logit_divisor
        factor = config.residual_multiplier
        self.layers = [
            replace(layer, attention=Scaled(layer.attention, factor), mlp=Scaled(layer.mlp, factor))
            for layer in self.layers
        ]

    def embed(self, input_ids: Tensor) -> Tensor:
        return super().embed(input_ids).mul_(self.embedding_multiplier)

    def logits(self, hidden_states: HiddenStates, tokens: Tensor | None) -> Tensor:
        return super().logits(hidden_states, tokens).div_(self.logit_divisor)
