# SPDX-License-Identifier: Apache-2.0
"""EXAONE 4: LLaMA with norms behind attention and MLP, not in front, norms of heads, and a window in some layers.

Of a model with a window, the layers without it have no rotary embeddings: see `ropes` of its ModelConfig.
"""

from __future__ import annotations

from lightllm_backend.models.layers import AttentionOptions
from lightllm_backend.models.llama import LlamaForCausalLM, NormNames
from lightllm_backend.models.model_config import ModelConfig


class Exaone4ForCausalLM(LlamaForCausalLM):
    """EXAONE 4."""

    norm_names = NormNames(None, None, "post_attention_layernorm", "post_feedforward_layernorm")

    @staticmethod
    def attention_options(config: ModelConfig, layer: int) -> AttentionOptions:
        return AttentionOptions(window=config.window(layer), has_head_norm=True)
