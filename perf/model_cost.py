# SPDX-License-Identifier: Apache-2.0
"""What a model must read and compute at least: the floors of the benchmarks, and how much arithmetic a prefill is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lightllm_backend.kernels import reference
from lightllm_backend.kv_pool.storage import KVStorage
from lightllm_backend.models.causal_lm import model_class
from lightllm_backend.models.model_config import ModelConfig
from lightllm_backend.models.quantization.scheme import Activations
from lightllm_backend.models.quantization.slots import QuantizedSlot
from lightllm_backend.models.weights import HEAD, WeightSlot
from lightllm_backend.parallel import TensorParallel


@dataclass(frozen=True)
class ModelCost:
    """Of the whole model, however many GPUs hold it."""

    layer_weights: int  # by which every token is multiplied
    head_weights: int  # by which those tokens are whose logits are wanted
    weight_bytes: int  # read in a decode step
    slot_bytes: int  # K and V of one token
    attention_flops: int  # of one query with one token of its context
    # Those layer_weights that activations of 8 bits may multiply.
    eight_bit_weights: int = 0
    # What a query sees in this share of the layers, its own position included.
    window: int = 0
    window_share: float = 0.0

    @classmethod
    def of(
        cls,
        directory: str,
        dtype: torch.dtype,
        kv_dtype: torch.dtype,
        weight_dtype: str = "auto",
        head_dtype: str = "auto",
    ) -> ModelCost:
        shape = ModelConfig.from_directory(directory).with_weight_dtype(weight_dtype, head_dtype, tp=1)
        device = torch.device("meta")
        model = model_class(shape.architecture)(shape, reference, TensorParallel(), dtype, device, 1)
        named = model.weight_map()
        slots = named.values()
        weights = sum(slot.num_weights for slot in slots)
        head = shape.vocab_size * shape.hidden_size
        # Of the table of embeddings, a step reads only the rows of its tokens; tied, it is the head as well.
        layers = weights - head * (1 if shape.tie_word_embeddings else 2)
        return cls(
            layer_weights=layers,
            head_weights=head,
            weight_bytes=sum(slot.nbytes for slot in slots) - (weights - layers - head) * dtype.itemsize,
            slot_bytes=KVStorage.slot_bytes(shape.num_layers, shape.num_kv_heads, shape.head_dim, kv_dtype),
            attention_flops=4 * shape.num_layers * shape.num_heads * shape.head_dim,
            window=shape.sliding_window or 0,
            window_share=sum(shape.sliding_layers) / shape.num_layers,
            eight_bit_weights=sum(slot.num_weights for name, slot in named.items() if _takes_8_bits(shape, name, slot)),
        )

    def step_seconds(self, batch: int, context_tokens: float, limits: dict[str, Any]) -> float:
        """The least that a decode step takes on one GPU: its weights or its matrix products, then all of K and V."""
        weights_read = self.weight_bytes / limits["read_bytes_per_second"]
        arithmetic = self._arithmetic_seconds(2 * (self.layer_weights + self.head_weights) * batch, batch, limits)
        in_windows = min(context_tokens, batch * self.window)
        tokens_read = context_tokens + self.window_share * (in_windows - context_tokens)
        kv_read = tokens_read * self.slot_bytes / limits["read_bytes_per_second"]
        return float(max(weights_read, arithmetic) + kv_read)

    def prefill_flops(self, prompt_lengths: Sequence[int]) -> int:
        """Matrix products of every token, causal attention, and the logits of each prompt's last token."""
        pairs = sum(_pairs(length) for length in prompt_lengths)
        behind_windows = sum(_pairs(length - self.window) for length in prompt_lengths if length > self.window)
        matrices = self.layer_weights * sum(prompt_lengths) + self.head_weights * len(prompt_lengths)
        return 2 * matrices + int(self.attention_flops * (pairs - self.window_share * behind_windows))

    def prefill_seconds(self, prompt_lengths: Sequence[int], limits: dict[str, Any]) -> float:
        """The least that the arithmetic of a prefill takes on one GPU."""
        return self._arithmetic_seconds(self.prefill_flops(prompt_lengths), sum(prompt_lengths), limits)

    def _arithmetic_seconds(self, flops: int, tokens: int, limits: dict[str, Any]) -> float:
        """The time of these operations for these tokens; tensor cores do some of them in 8 bits."""
        in_8_bits = 2 * self.eight_bit_weights * tokens
        peak = limits["bf16_flops_per_second"]
        return float((flops - in_8_bits) / peak + in_8_bits / (limits.get("fp8_flops_per_second") or peak))


def _pairs(length: int) -> int:
    """The pairs of a query and a token that it sees, in causal attention."""
    return length * (length + 1) // 2


def _takes_8_bits(shape: ModelConfig, name: str, slot: WeightSlot) -> bool:
    """Whether the slot is that of a layer's matrix whose product may have activations of 8 bits."""
    if name == HEAD or not isinstance(slot, QuantizedSlot):
        return False
    scheme = shape.quantization.scheme(name.rpartition(".")[0])
    return scheme is not None and scheme.activations is not Activations.AS_THEY_ARE
