# SPDX-License-Identifier: Apache-2.0
"""Seed-OSS: LLaMA whose output projection of attention has a key of its own for its bias."""

from __future__ import annotations

from lightllm_backend.models.layers import AttentionOptions
from lightllm_backend.models.llama import LlamaForCausalLM
from lightllm_backend.models.model_config import ModelConfig


class SeedOssForCausalLM(LlamaForCausalLM):
    """Seed-OSS."""

    @staticmethod
    def attention_options(config: ModelConfig, layer: int) -> AttentionOptions:  # noqa: ARG004 - all layers are alike
        return AttentionOptions(qkv_bias=config.attention_bias, output_bias=config.attention_out_bias)
