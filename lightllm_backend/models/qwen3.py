# SPDX-License-Identifier: Apache-2.0
"""Qwen3: LLaMA with a norm of each head's query and key, and an optional sliding window in some of its layers."""

from __future__ import annotations

from lightllm_backend.models.layers import AttentionOptions
from lightllm_backend.models.llama import LlamaForCausalLM
from lightllm_backend.models.model_config import ModelConfig


class Qwen3ForCausalLM(LlamaForCausalLM):
    """Qwen3."""

    @staticmethod
    def attention_options(config: ModelConfig, layer: int) -> AttentionOptions:
        bias = config.attention_bias
        return AttentionOptions(qkv_bias=bias, output_bias=bias, window=config.window(layer), has_head_norm=True)
