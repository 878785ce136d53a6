# SPDX-License-Identifier: Apache-2.0
"""LLaMA, and all models that Hugging Face calls LlamaForCausalLM: RMSNorm, rotary embeddings, gated MLP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightllm_backend.kernels.interface import Kernels
from lightllm_backend.kernels.quantized.rounded_tokens import Activations
from lightllm_backend.kernels.quantized.weight import Weight
from lightllm_backend.models.decoder import Decoder, DecoderLayer, Norm
from lightllm_backend.models.layers import Attention, AttentionOptions, StepInput
from lightllm_backend.models.linear import ColumnLinear, Part, RowLinear, fused_parts
from lightllm_backend.models.model_config import ModelConfig
from lightllm_backend.models.norm_weight import NormWeight
from lightllm_backend.models.placement import Placement
from lightllm_backend.models.rotary import RotaryEmbedding, Rotation
from lightllm_backend.models.vocabulary import Embedding, Head
from lightllm_backend.models.weights import WeightSlot
from lightllm_backend.parallel import TensorParallel

# Tensors that some checkpoints carry beside the weights: tables of rotary embeddings (the first versions of
# transformers saved one, ColossalAI saves all) and a version number, which transformers' first LLaMA ignored too.
OLD_BUFFERS = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached", "decoder.version")


class RMSNorm:
    """RMS norm of `x`, or of `residual += x`, which it updates in place after summing `x` over the ranks.

    With a post-norm, which a layer owns, the sum is normed before it is added.
    """

    def __init__(
        self,
        name: str,
        config: ModelConfig,
        place: Placement,
        from_one: bool = False,
        post_norm: NormWeight | None = None,
    ) -> None:
        self.own = NormWeight(name, config.hidden_size, place, from_one)
        self.weight = self.own.value
        self.post_weight = None if post_norm is None else post_norm.value
        self.kernels = place.kernels
        self.parallel = place.parallel
        self.eps = config.norm_eps

    def __call__(self, x: Tensor, residual: Tensor | None = None, reader: Weight | None = None) -> Activations:
        if residual is not None:
            if buffers := self.parallel.lamport_buffers(*x.shape[-2:]):
                return self.kernels.all_reduce_rms_norm(
                    x, self.weight, self.eps, residual, buffers, self.post_weight, reader
                )
            x = self.parallel.all_reduce(x)
            return self.kernels.rms_norm(x, self.weight, self.eps, residual, self.post_weight, reader)
        return self.kernels.rms_norm(x, self.weight, self.eps, reader=reader)

    def weight_map(self) -> dict[str, WeightSlot]:
        return self.own.weight_map()


class PostNorm:
    """Adds `x`, summed over the ranks and normed, to the residual, and returns the residual itself.

    In front of attention or an MLP whose input has no norm. The layer owns the weight; the first one has none.
    """

    def __init__(self, config: ModelConfig, place: Placement, weight: NormWeight | None) -> None:
        self.kernels = place.kernels
        self.parallel = place.parallel
        self.eps = config.norm_eps
        self.weight = None if weight is None else weight.value

    def __call__(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        reader: Weight | None = None,  # noqa: ARG002 - the residual stays as it is
    ) -> Tensor:
        if residual is None:
            return x
        assert self.weight is not None, "a layer that follows another has its post-norm"
        # The kernel also norms the sum, which is of no use here.
        if buffers := self.parallel.lamport_buffers(*x.shape[-2:]):
            self.kernels.all_reduce_rms_norm(x, self.weight, self.eps, residual, buffers, self.weight)
        else:
            self.kernels.rms_norm(self.parallel.all_reduce(x), self.weight, self.eps, residual, self.weight)
        return residual

    def weight_map(self) -> dict[str, WeightSlot]:
        return {}


class NormNames(NamedTuple):
    """The norms of a layer, as a checkpoint calls them."""

    attention: str | None  # of attention's input; None: it has none
    mlp: str | None
    post_attention: str | None = None  # of attention's output, before it is added to the residual; None: it has none
    post_mlp: str | None = None


class GatedMLP:
    """down(silu(gate(x)) * up(x)), with the intermediate features split over the ranks. Leaves the sum to the norm."""

    def __init__(self, config: ModelConfig, place: Placement, is_fused: bool = False, is_gelu: bool = False) -> None:
        """`is_fused`: the checkpoint has gate and up in one matrix. `is_gelu`: GELU takes the place of SiLU."""
        self.is_gelu = is_gelu
        features = config.intermediate_size
        share = place.share("intermediate_size", features)
        parts = [Part(f"mlp.{name}", features, share, share * place.parallel.rank) for name in ("gate_proj", "up_proj")]
        if is_fused:
            parts = fused_parts("mlp.gate_up_proj", parts)
        self.gate_up = ColumnLinear(parts, config.hidden_size, config.mlp_bias, place)
        self.down = RowLinear("mlp.down_proj", features, config.hidden_size, config.mlp_bias, place)

    @property
    def reader(self) -> Weight:
        return self.gate_up.weight

    def __call__(self, x: Activations) -> Tensor:
        return self.down.unsummed(self.gate_up.gated(x, self.is_gelu, self.down.weight))

    def weight_map(self) -> dict[str, WeightSlot]:
        return self.gate_up.weight_map() | self.down.weight_map()


class LlamaForCausalLM(Decoder):
    """LLaMA. Mistral and Qwen2 differ from it in `attention_options`."""

    prefix = "model."
    embedding_name = "model.embed_tokens.weight"
    layers_name = "model.layers"
    old_buffers = OLD_BUFFERS
    has_fused_mlp = False  # the checkpoint has gate and up in one matrix
    has_gelu = False  # in the MLP, instead of SiLU
    norm_names = NormNames("input_layernorm", "post_attention_layernorm")
    norms_from_one = False  # see NormWeight
    attention_class = Attention

    @staticmethod
    def attention_options(config: ModelConfig, layer: int) -> AttentionOptions:  # noqa: ARG004 - some mix their layers
        """The attention of one layer: a hook for models that follow LLaMA (biases, sliding window)."""
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
        self.place = place = Placement(parallel, dtype, device, kernels, config.quantization)
        places = [place.within(f"{self.layers_name}.{layer}") for layer in range(config.num_layers)]
        self.embedding = Embedding(config.vocab_size, config.hidden_size, place)
        ropes = list(dict.fromkeys(config.ropes))
        self.rotary = [RotaryEmbedding(rope, max_length, device) for rope in ropes]
        self.rotary_of_layers = [ropes.index(rope) for rope in config.ropes]
        self.layers = []
        before: NormWeight | None = None  # the post-norm of the MLP before
        for layer, here in enumerate(places):
            post_attention, post_mlp = (
                None if name is None else NormWeight(name, config.hidden_size, here, self.norms_from_one)
                for name in (self.norm_names.post_attention, self.norm_names.post_mlp)
            )
            options = self.attention_options(config, layer)
            self.layers.append(
                DecoderLayer(
                    self._norm(self.norm_names.attention, config, here, before),
                    self.attention_class(config, options, here),
                    self._norm(self.norm_names.mlp, config, here, post_attention),
                    GatedMLP(config, here, self.has_fused_mlp, self.has_gelu),
                    [weight for weight in (post_attention, post_mlp) if weight is not None],
                    options.window,
                )
            )
            before = post_mlp
        self.norm = RMSNorm("model.norm", config, place, self.norms_from_one, before)
        self.head = Head(self.embedding, config.tie_word_embeddings, place, config.logit_softcap)
        self.num_kv_heads, _ = place.kv_share(config.num_kv_heads)
        self.head_dim = config.head_dim

    def _norm(self, name: str | None, config: ModelConfig, place: Placement, post_norm: NormWeight | None) -> Norm:
        if name is None:
            return PostNorm(config, place, post_norm)
        return RMSNorm(name, config, place, self.norms_from_one, post_norm)

    def rotations(self, step: StepInput) -> Sequence[Rotation]:
        made = [rotary(step.positions, step.rotary_lengths) for rotary in self.rotary]
        return [made[kind] for kind in self.rotary_of_layers]
