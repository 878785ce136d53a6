# SPDX-License-Identifier: Apache-2.0
"""Gemma 2: LLaMA with four norms a layer, a GELU gate, scaled embeddings, and soft caps of scores and logits.

Every second layer has a sliding window.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from lightllm_backend.models.layers import AttentionOptions
from lightllm_backend.models.llama import LlamaForCausalLM, NormNames
from lightllm_backend.models.model_config import ModelConfig


class Gemma2ForCausalLM(LlamaForCausalLM):
    """Gemma 2."""

    has_gelu = True
    norms_from_one = True
    exceeds_float16 = True
    norm_names = NormNames(
        attention="input_layernorm",
        mlp="pre_feedforward_layernorm",
        post_attention="post_attention_layernorm",
        post_mlp="post_feedforward_layernorm",
    )

    @staticmethod
    def attention_options(config: ModelConfig, layer: int) -> AttentionOptions:
        bias = config.attention_bias
        return AttentionOptions(qkv_bias=bias, output_bias=bias, window=config.window(layer), norms_from_one=True)

    def embed(self, input_ids: Tensor) -> Tensor:
        x = super().embed(input_ids)
        return x.mul_(_rounded_root(x.shape[1], x.dtype))


@lru_cache
def _rounded_root(number: int, dtype: torch.dtype) -> float:
    """The square root, rounded as when the models were trained."""
    return torch.tensor(number**0.5, dtype=dtype).item()
