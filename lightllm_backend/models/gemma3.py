# SPDX-License-Identifier: Apache-2.0
"""The text part of Gemma 3's models that take images too: Gemma 3 whose tensors have longer names."""

from __future__ import annotations

from lightllm_backend.models.gemma3_text import Gemma3ForCausalLM

# What the names begin with, in files that transformers writes and in its classes since 4.52, and in Gemma3ForCausalLM.
PREFIXES = {"language_model.model.": "model.", "model.language_model.": "model.", "language_model.lm_head.": "lm_head."}
OF_IMAGES = ("vision_tower.", "multi_modal_projector.")


class Gemma3ForConditionalGeneration(Gemma3ForCausalLM):
    """Gemma 3 without its eyes."""

    def rename(self, name: str) -> str:
        for prefix, own in PREFIXES.items():
            if name.startswith(prefix):
                return own + name.removeprefix(prefix)
        return name

    def ignores(self, name: str) -> bool:
        return name.removeprefix("model.").startswith(OF_IMAGES) or super().ignores(self.rename(name))
