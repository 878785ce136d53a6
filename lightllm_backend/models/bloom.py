# SPDX-License-Identifier: Apache-2.0
"""BLOOM: LayerNorm, attention with linear biases (ALiBi) in place of position embeddings, and a GELU MLP."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightllm_backend.kernels.interface import Kernels
from lightllm_backend.kernels.quantized.rounded_tokens import Activations
from lightllm_backend.kernels.quantized.weight import Weight
from lightllm_backend.models.decoder import Decoder, DecoderLayer
from lightllm_backend.models.layers import KVLayer, PoolAttention, StepInput, alibi_slopes
from lightllm_backend.models.linear import ColumnLinear, Part, RowLinear
from lightllm_backend.models.model_config import ModelConfig
from lightllm_backend.models.placement import Placement
from lightllm_backend.models.rotary import Rotation
from lightllm_backend.models.vocabulary import Embedding, Head
from lightllm_backend.models.weights import WeightSlot
from lightllm_backend.parallel import TensorParallel

# A mask that the first converted checkpoints carry beside the weights.
OLD_BUFFER = "scale_mask_softmax.causal_mask"


class LayerNorm:
    """Layer norm of `x`, or of `residual += x`, which it updates in place."""

    def __init__(self, name: str, config: ModelConfig, place: Placement) -> None:
        self.name = name
        self.kernels = place.kernels
        self.eps = config.norm_eps
        self.weight = place.empty(config.hidden_size)
        self.bias = place.empty(config.hidden_size)

    def __call__(self, x: Tensor, residual: Tensor | None = None, reader: Weight | None = None) -> Activations:
        return self.kernels.layer_norm(x, self.weight, self.bias, self.eps, residual, reader)

    def weight_map(self) -> dict[str, WeightSlot]:
        return {
            f"{self.name}.weight": WeightSlot.whole(self.weight, mean=1.0),
            f"{self.name}.bias": WeightSlot.whole(self.bias),
        }


class BloomAttention:
    """Self-attention. The checkpoint keeps q, k and v of each head side by side: [heads, 3, head_dim]."""

    def __init__(self, config: ModelConfig, slopes: Tensor, place: Placement) -> None:
        self.head_dim = config.head_dim
        self.num_heads = slopes.shape[0]
        self.attend = PoolAttention(place.kernels, config.head_dim**-0.5, alibi_slopes=slopes)
        rows = 3 * self.head_dim * self.num_heads
        part = Part("self_attention.query_key_value", 3 * config.hidden_size, rows, rows * place.parallel.rank)
        self.qkv = ColumnLinear([part], config.hidden_size, True, place)
        self.output = RowLinear("self_attention.dense", config.hidden_size, config.hidden_size, True, place)

    @property
    def reader(self) -> Weight:
        return self.qkv.weight

    def __call__(self, x: Activations, rotation: Rotation, kv: KVLayer, step: StepInput) -> Tensor:
        q, k, v = self.qkv(x).view(x.shape[0], self.num_heads, 3, self.head_dim).unbind(2)
        return self.output(self.attend(q, k, v, rotation, kv, step))

    def weight_map(self) -> dict[str, WeightSlot]:
        return self.qkv.weight_map() | self.output.weight_map()


class BloomMLP:
    """down(gelu(up(x))), with the intermediate features split over the ranks."""

    def __init__(self, config: ModelConfig, place: Placement) -> None:
        features = config.intermediate_size
        share = place.share("4 * hidden_size", features)
        part = Part("mlp.dense_h_to_4h", features, share, share * place.parallel.rank)
        self.up = ColumnLinear([part], config.hidden_size, True, place)
        self.down = RowLinear("mlp.dense_4h_to_h", features, config.hidden_size, True, place)

    @property
    def reader(self) -> Weight:
        return self.up.weight

    def __call__(self, x: Activations) -> Tensor:
        return self.down(self.up.gelu(x))

    def weight_map(self) -> dict[str, WeightSlot]:
        return self.up.weight_map() | self.down.weight_map()


class BloomForCausalLM(Decoder):
    """BLOOM, whose embeddings have a norm of their own."""

    prefix = "transformer."
    embedding_name = "transformer.word_embeddings.weight"
    layers_name = "transformer.h"
    old_buffers = (OLD_BUFFER,)

    def __init__(
        self,
        config: ModelConfig,
        kernels: Kernels,
        parallel: TensorParallel,
        dtype: torch.dtype,
        device: torch.device,
        max_length: int,  # noqa: ARG002 - no table of positions
    ) -> None:
        self.place = place = Placement(parallel, dtype, device, kernels, config.quantization)
        self.num_kv_heads = place.share("num_attention_heads", config.num_heads)
        self.head_dim = config.head_dim
        # One tensor for all layers.
        slopes = alibi_slopes(config.num_heads).to(device).chunk(parallel.size)[parallel.rank]
        self.embedding = Embedding(config.vocab_size, config.hidden_size, place)
        self.embedding_norm = LayerNorm("transformer.word_embeddings_layernorm", config, place)
        self.layers = [
            DecoderLayer(
                LayerNorm("input_layernorm", config, here),
                BloomAttention(config, slopes, here),
                LayerNorm("post_attention_layernorm", config, here),
                BloomMLP(config, here),
            )
            for here in (place.within(f"{self.layers_name}.{layer}") for layer in range(config.num_layers))
        ]
        self.norm = LayerNorm("transformer.ln_f", config, place)
        self.head = Head(self.embedding, config.tie_word_embeddings, place)

    def embed(self, input_ids: Tensor) -> Tensor:
        normed = self.embedding_norm(self.embedding(input_ids))
        assert isinstance(normed, Tensor), "a norm without a reader does not round"
        return normed

    def rotations(self, step: StepInput) -> Sequence[Rotation]:
        return [Rotation.none(step.positions)] * len(self.layers)

    def embedding_weight_map(self) -> dict[str, WeightSlot]:
        return super().embedding_weight_map() | self.embedding_norm.weight_map()
