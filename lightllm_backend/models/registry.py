# SPDX-License-Identifier: Apache-2.0
"""Which class computes which architecture. A new model is one file, its weight map, and one line here."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, NamedTuple

from lightllm_backend.models.errors import ModelError

if TYPE_CHECKING:
    from lightllm_backend.models.layers import CausalLM


class Architecture(NamedTuple):
    module: str  # of this folder
    dialect: str = "llama"  # how its config.json is written: see model_config


# By the name in config.json's `architectures`, which is also the class's.
ARCHITECTURES = {
    "BloomForCausalLM": Architecture("bloom", dialect="bloom"),
    "LlamaForCausalLM": Architecture("llama"),
    "MistralForCausalLM": Architecture("mistral"),
    "Qwen2ForCausalLM": Architecture("qwen2"),
}


def check_architecture(architecture: str) -> None:
    """Refuse an architecture that no model here computes; imports none of them, hence no torch."""
    if architecture not in ARCHITECTURES:
        raise ModelError(f"the architecture {architecture!r} is not known; known: {', '.join(sorted(ARCHITECTURES))}")


def model_class(architecture: str) -> type[CausalLM]:
    """The class of the model, imported now."""
    check_architecture(architecture)
    module = importlib.import_module(f"lightllm_backend.models.{ARCHITECTURES[architecture].module}")
    found: type[CausalLM] = getattr(module, architecture)
    return found
