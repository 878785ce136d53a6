# SPDX-License-Identifier: Apache-2.0
"""Mistral: LLaMA with an optional sliding window of attention."""

from __future__ import annotations

from lightllm_backend.models.layers import AttentionOptions
from lightllm_backend.models.llama import LlamaForCausalLM
from lightllm_backend.models.model_config import ModelConfig


class MistralForCausalLM(LlamaForCausalLM):
    """Mistral."""

    @staticmethod
    def attention_options(config: ModelConfig, layer: int) -> AttentionOptions:
        return AttentionOptions(window=config.window(layer))
