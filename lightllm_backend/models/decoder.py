# SPDX-License-Identifier: Apache-2.0
"""Decoder: the forward pass that LLaMA, BLOOM and their like share: embeddings, decoder layers, head.

A model derives from it and makes the parts in its `__init__`: norms, attention and MLPs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from lightllm_backend.kernels.quantized.rounded_tokens import Activations
from lightllm_backend.kernels.quantized.weight import Weight
from lightllm_backend.models.layers import HiddenStates, KVLayer, StepInput
from lightllm_backend.models.norm_weight import NormWeight
from lightllm_backend.models.placement import Placement
from lightllm_backend.models.rotary import Rotation
from lightllm_backend.models.vocabulary import Embedding, Head, select_tokens
from lightllm_backend.models.weights import HEAD, WeightSlot


class Norm(Protocol):
    """A norm of `x`, or of `residual += x`, which it updates in place. Only the product with `reader` reads it."""

    def __call__(self, x: Tensor, residual: Tensor | None = None, reader: Weight | None = None) -> Activations: ...

    def weight_map(self) -> dict[str, WeightSlot]: ...


class SelfAttention(Protocol):
    """Attention of a step's tokens, with its projections. A norm takes its output."""

    @property
    def reader(self) -> Weight: ...  # the weight that multiplies the input

    def __call__(self, x: Activations, rotation: Rotation, kv: KVLayer, step: StepInput) -> Tensor: ...

    def weight_map(self) -> dict[str, WeightSlot]: ...


class MLP(Protocol):
    """The feed-forward part of a layer. A norm takes its output."""

    @property
    def reader(self) -> Weight: ...  # the weight that multiplies the input

    def __call__(self, x: Activations) -> Tensor: ...

    def weight_map(self) -> dict[str, WeightSlot]: ...


@dataclass(frozen=True)
class DecoderLayer:
    """Attention and MLP, each behind a norm that first adds the previous output to the residual.

    If the layer norms an output before it is added, the norm that adds it, here or in the next layer, does that too.
    """

    attention_norm: Norm
    attention: SelfAttention
    mlp_norm: Norm
    mlp: MLP
    post_norms: Sequence[NormWeight] = ()  # of attention's output and of the MLP's
    window: int = 0  # of attention, see AttentionOptions

    def weight_map(self) -> dict[str, WeightSlot]:
        parts: list[Norm | SelfAttention | MLP | NormWeight] = [
            self.attention_norm, self.attention, self.mlp_norm, self.mlp, *self.post_norms,
        ]  # fmt: skip
        return {name: slot for part in parts for name, slot in part.weight_map().items()}


class Decoder(ABC):
    """One rank's part of a decoder-only model. causal_lm.CausalLM describes its methods."""

    # Names in a checkpoint, which each model sets.
    prefix: str
    embedding_name: str
    layers_name: str
    old_buffers: tuple[str, ...]  # endings of tensors that old checkpoints carry beside the weights

    # Parts, which each model makes.
    place: Placement
    embedding: Embedding
    layers: list[DecoderLayer]
    norm: Norm
    head: Head
    num_kv_heads: int
    head_dim: int
    exceeds_float16 = False

    def embed(self, input_ids: Tensor) -> Tensor:
        """The hidden states [tokens, hidden_size] that enter the first layer."""
        return self.embedding(input_ids)

    @abstractmethod
    def rotations(self, step: StepInput) -> Sequence[Rotation]:
        """The rotary embeddings of the step's tokens in each layer."""

    @property
    def windows(self) -> list[int]:
        return [layer.window for layer in self.layers]

    def forward(self, step: StepInput) -> Tensor:
        return self.logits(self.hidden_states(step), step.last_tokens)

    def hidden_states(self, step: StepInput) -> HiddenStates:
        residual = self.embed(step.input_ids)
        x, added = residual, None
        # Written out here: a call of a layer would keep its input alive, as the caller's variable, to its end.
        for layer, rotation, kv in zip(self.layers, self.rotations(step), step.kv_layers, strict=True):
            normed = layer.attention_norm(x, added, layer.attention.reader)
            del x  # attention needs the memory
            x = layer.attention(normed, rotation, kv, step)
            del normed
            x = layer.mlp(layer.mlp_norm(x, residual, layer.mlp.reader))
            added = residual
        return x, residual

    def logits(self, hidden_states: HiddenStates, tokens: Tensor | None) -> Tensor:
        normed = self.norm(*select_tokens(*hidden_states, tokens))
        assert isinstance(normed, Tensor), "a norm without a reader does not round"
        return self.head(normed)

    def weight_map(self) -> dict[str, WeightSlot]:
        slots = self.embedding_weight_map()
        for index, layer in enumerate(self.layers):
            slots |= {f"{self.layers_name}.{index}.{name}": slot for name, slot in layer.weight_map().items()}
        return slots | self.norm.weight_map() | self.head.weight_map()

    def arrange_weights(self) -> None:
        self.place.arrange_weights()

    def embedding_weight_map(self) -> dict[str, WeightSlot]:
        """The weight map of all that comes before the first layer."""
        return self.embedding.weight_map(self.embedding_name)

    def rename(self, name: str) -> str:
        return name

    def left_out_by(self, layer: str) -> str:
        return self.place.quantization.left_out_by(layer)

    def ignores(self, name: str) -> bool:
        return name.endswith(self.old_buffers) or (name == HEAD and self.head.tied)
