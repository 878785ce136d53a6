# SPDX-License-Identifier: Apache-2.0
"""Mistral: LLaMA whose queries see only the last `sliding_window` positions, if there is one."""

from __future__ import annotations

from lightllm_backend.models.layers import AttentionOptions
from lightllm_backend.models.llama import LlamaForCausalLM
from lightllm_backend.models.model_config import ModelConfig


class MistralForCausalLM(LlamaForCausalLM):
    @staticmethod
    def attention_options(config: ModelConfig, layer: int) -> AttentionOptions:
        return AttentionOptions(window=config.window(layer))
