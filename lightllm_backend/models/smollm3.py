# SPDX-License-Identifier: Apache-2.0
"""SmolLM3: LLaMA without rotary embeddings in some of its layers, which may have a sliding window."""

from __future__ import annotations

from lightllm_backend.models.layers import AttentionOptions
from lightllm_backend.models.llama import LlamaForCausalLM
from lightllm_backend.models.model_config import ModelConfig


class SmolLM3ForCausalLM(LlamaForCausalLM):
    """SmolLM3."""

    @staticmethod
    def attention_options(config: ModelConfig, layer: int) -> AttentionOptions:
        bias = config.attention_bias
        return AttentionOptions(qkv_bias=bias, output_bias=bias, window=config.window(layer))
