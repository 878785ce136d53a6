# SPDX-License-Identifier: Apache-2.0
"""InternLM3: LLaMA by a configuration of its own."""

from __future__ import annotations

from lightllm_backend.models.llama import LlamaForCausalLM


class InternLM3ForCausalLM(LlamaForCausalLM):
    """InternLM3."""
