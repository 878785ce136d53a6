# SPDX-License-Identifier: Apache-2.0
"""LLaMA and LLaMA-2 (and whatever else Hugging Face calls LlamaForCausalLM): RMSNorm, rotary embeddings, gated MLP."""

from __future__ import annotations

import torch
from torch import Tensor

from lightllm_backend.kernels.interface import Kernels
from lightllm_backend.models.layers import (
    Attention,
    AttentionOptions,
    ColumnLinear,
    Part,
    Placement,
    RotaryEmbedding,
    RowLinear,
    StepInput,
)
from lightllm_backend.models.model_config import ModelConfig
from lightllm_backend.models.vocabulary import Embedding, Head, wanted
from lightllm_backend.models.weights import HEAD, WeightSlot
from lightllm_backend.parallel import TensorParallel

# What some checkpoints carry beside the weights: the tables of rotary embeddings, of which the first versions of
# transformers saved one and ColossalAI saves all, and a version number that transformers' first LLaMA ignored as well.
OLD_BUFFERS = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached", "decoder.version")


class RMSNorm:
    """Root-mean-square norm of `x`, or of `residual +=` the sum of all ranks' `x`, which is updated in place."""

    def __init__(self, name: str, config: ModelConfig, place: Placement) -> None:
        self.name = name
        self.kernels = place.kernels
        self.parallel = place.parallel
        self.eps = config.norm_eps
        self.weight = place.empty(config.hidden_size)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if residual is not None:
            if buffers := self.parallel.lamport_buffers(*x.shape[-2:]):
                return self.kernels.all_reduce_rms_norm(x, self.weight, self.eps, residual, buffers)
            x = self.parallel.all_reduce(x)
        return self.kernels.rms_norm(x, self.weight, self.eps, residual)

    def weight_map(self) -> dict[str, WeightSlot]:
        return {f"{self.name}.weight": WeightSlot.whole(self.weight, mean=1.0)}


class GatedMLP:
    """down(silu(gate(x)) * up(x)); the intermediate features are split by rank."""

    def __init__(self, config: ModelConfig, place: Placement) -> None:
        features = config.intermediate_size
        share = place.share("intermediate_size", features)
        parts = [Part(f"mlp.{name}", features, share, share * place.parallel.rank) for name in ("gate_proj", "up_proj")]
        self.gate_up = ColumnLinear(parts, config.hidden_size, config.mlp_bias, place)
        self.down = RowLinear("mlp.down_proj", features, config.hidden_size, config.mlp_bias, place)

    def __call__(self, x: Tensor) -> Tensor:
        return self.down.unsummed(self.gate_up.gated(x))

    def weight_map(self) -> dict[str, WeightSlot]:
        return self.gate_up.weight_map() | self.down.weight_map()


class LlamaLayer:
    """Attention and MLP, each after a norm that first adds what came before to the residual."""

    def __init__(self, config: ModelConfig, options: AttentionOptions, place: Placement) -> None:
        self.attention_norm = RMSNorm("input_layernorm", config, place)
        self.attention = Attention(config, options, place)
        self.mlp_norm = RMSNorm("post_attention_layernorm", config, place)
        self.mlp = GatedMLP(config, place)

    def weight_map(self) -> dict[str, WeightSlot]:
        parts = (self.attention_norm, self.attention, self.mlp_norm, self.mlp)
        return {name: slot for part in parts for name, slot in part.weight_map().items()}


class LlamaForCausalLM:
    """One rank's part of the model. See layers.CausalLM for what each method owes its caller."""

    prefix = "model."
    embedding_name = "model.embed_tokens.weight"

    @staticmethod
    def attention_options(config: ModelConfig, layer: int) -> AttentionOptions:  # noqa: ARG004 - some mix their layers
        """What those who follow LLaMA do otherwise."""
        return AttentionOptions(qkv_bias=config.attention_bias, output_bias=config.attention_bias)

    def __init__(
        self,
        config: ModelConfig,
        kernels: Kernels,
        parallel: TensorParallel,
        dtype: torch.dtype,
        device: torch.device,
        max_length: int,
    ) -> None:
        place = Placement(parallel, dtype, device, kernels)
        self.embedding = Embedding(config.vocab_size, config.hidden_size, place)
        self.rotary = RotaryEmbedding(config, max_length, device)
        options = [self.attention_options(config, layer) for layer in range(config.num_layers)]
        self.layers = [LlamaLayer(config, layer_options, place) for layer_options in options]
        self.norm = RMSNorm("model.norm", config, place)
        self.head = Head(self.embedding, config.tie_word_embeddings, place)
        self.num_kv_heads = self.layers[0].attention.num_kv_heads
        self.head_dim = config.head_dim

    def forward(self, step: StepInput) -> Tensor:
        cos, sin = self.rotary(step.positions, step.rotary_lengths)
        residual = self.embedding(step.input_ids)
        x, added = residual, None
        for layer, kv in zip(self.layers, step.kv_layers, strict=True):
            x = layer.attention_norm(x, added)
            x = layer.attention(x, cos, sin, kv, step)
            x = layer.mlp(layer.mlp_norm(x, residual))
            added = residual
        return self.head(self.norm(*wanted(x, residual, step.last_tokens)))

    def weight_map(self) -> dict[str, WeightSlot]:
        slots = self.embedding.weight_map(self.embedding_name)
        for index, layer in enumerate(self.layers):
            slots |= {f"model.layers.{index}.{name}": slot for name, slot in layer.weight_map().items()}
        return slots | self.norm.weight_map() | self.head.weight_map()

    def ignores(self, name: str) -> bool:
        return name.endswith(OLD_BUFFERS) or (name == HEAD and self.head.tied)
