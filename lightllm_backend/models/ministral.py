# SPDX-License-Identifier: Apache-2.0
"""Ministral: Mistral whose sliding window may be in some of its layers only."""

from __future__ import annotations

from lightllm_backend.models.mistral import MistralForCausalLM


class MinistralForCausalLM(MistralForCausalLM):
    """Ministral. transformers 5 also saves a Mistral with `layer_types` under this name."""
