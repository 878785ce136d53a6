# SPDX-License-Identifier: Apache-2.0
"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: LLaMA whose checkpoint has fused projections, with an optional window."""

from __future__ import annotations

from lightllm_backend.models.layers import AttentionOptions
from lightllm_backend.models.llama import LlamaForCausalLM
from lightllm_backend.models.model_config import ModelConfig


class Phi3ForCausalLM(LlamaForCausalLM):
    """Phi-3."""

    has_fused_mlp = True

    @staticmethod
    def attention_options(config: ModelConfig, layer: int) -> AttentionOptions:
        return AttentionOptions(window=config.window(layer), is_fused=True)
