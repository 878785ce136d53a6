# SPDX-License-Identifier: Apache-2.0
"""Gemma 3, text: Gemma 2 with a norm of each head's query and key, and mostly without soft caps.

Layers with a sliding window have rotary embeddings of their own.
"""

from __future__ import annotations

from dataclasses import replace

from lightllm_backend.models.gemma2 import Gemma2ForCausalLM
from lightllm_backend.models.layers import AttentionOptions
from lightllm_backend.models.model_config import ModelConfig


class Gemma3ForCausalLM(Gemma2ForCausalLM):
    """Gemma 3."""

    @staticmethod
    def attention_options(config: ModelConfig, layer: int) -> AttentionOptions:
        return replace(Gemma2ForCausalLM.attention_options(config, layer), has_head_norm=True)
