# SPDX-License-Identifier: Apache-2.0
"""Qwen2: LLaMA with biases of q, k and v, and an optional sliding window in some of its layers."""

from __future__ import annotations

from lightllm_backend.models.layers import AttentionOptions
from lightllm_backend.models.llama import LlamaForCausalLM
from lightllm_backend.models.model_config import ModelConfig


class Qwen2ForCausalLM(LlamaForCausalLM):
    """Qwen2."""

    @staticmethod
    def attention_options(config: ModelConfig, layer: int) -> AttentionOptions:
        return AttentionOptions(qkv_bias=True, window=config.window(layer))
