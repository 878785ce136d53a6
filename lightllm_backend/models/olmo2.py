# SPDX-License-Identifier: Apache-2.0
"""OLMo 2: LLaMA with norms behind attention and MLP, not in front, and of all heads' queries and keys together."""

from __future__ import annotations

import torch
from torch import Tensor

from lightllm_backend.kernels.quantized.rounded_tokens import Activations
from lightllm_backend.models.layers import Attention, AttentionOptions, KVLayer, StepInput
from lightllm_backend.models.llama import LlamaForCausalLM, NormNames
from lightllm_backend.models.model_config import ModelConfig
from lightllm_backend.models.placement import Placement
from lightllm_backend.models.rotary import Rotation
from lightllm_backend.models.weights import WeightSlot


class Olmo2Attention(Attention):
    """Attention whose queries are normed over all heads of the model, and so are its keys."""

    def __init__(self, config: ModelConfig, options: AttentionOptions, place: Placement) -> None:
        super().__init__(config, options, place)
        self.kernels, self.parallel, self.eps = place.kernels, place.parallel, config.norm_eps
        self.weights = [place.empty(part.rows) for part in self.qkv.parts[:2]]

    def __call__(self, x: Activations, rotation: Rotation, kv: KVLayer, step: StepInput) -> Tensor:
        q, k, v = torch.split(self.qkv(x), [part.rows for part in self.qkv.parts], dim=1)
        q, k, v = (heads.view(len(x), -1, self.head_dim) for heads in (*self._normed(q, k), v))
        return self.output.unsummed(self.attend(q, k, v, rotation, kv, step))

    def _normed(self, *parts: Tensor) -> list[Tensor]:
        if self.parallel.size == 1:
            normed = [self.kernels.rms_norm(x, w, self.eps) for x, w in zip(parts, self.weights, strict=True)]
            return [x for x in normed if isinstance(x, Tensor)]  # none is rounded without a reader
        squares = self.parallel.all_reduce(torch.stack([x.float().square().sum(-1) for x in parts]))
        # Ranks that share a KV head count it more than once, in both numbers.
        counts = [part.rows * self.parallel.size for part in self.qkv.parts[:2]]
        factors = [(square / count + self.eps).rsqrt_() for square, count in zip(squares, counts, strict=True)]
        return [
            (x.float() * factor[:, None] * w).to(x.dtype)
            for x, factor, w in zip(parts, factors, self.weights, strict=True)
        ]

    def weight_map(self) -> dict[str, WeightSlot]:
        names = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")
        return super().weight_map() | {
            name: WeightSlot(weight, (part.full_rows,), 0, part.start, mean=1.0)
            for name, weight, part in zip(names, self.weights, self.qkv.parts[:2], strict=True)
        }


class Olmo2ForCausalLM(LlamaForCausalLM):
    """OLMo 2."""

    attention_class = Olmo2Attention
    norm_names = NormNames(None, None, "post_attention_layernorm", "post_feedforward_layernorm")
