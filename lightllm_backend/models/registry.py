# SPDX-License-Identifier: Apache-2.0
"""Which class computes which architecture. A new model is one file, its weight map, its defaults, and one line here."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, NamedTuple

from lightllm_backend.models import config_defaults
from lightllm_backend.models.errors import ModelError

if TYPE_CHECKING:
    from lightllm_backend.models.layers import CausalLM


class Architecture(NamedTuple):
    module: str  # of this folder; its name is config.json's `model_type`
    defaults: config_defaults.Defaults  # of the keys of config.json
    dialect: str = "llama"  # how its config.json is written: see model_config


# By the name in config.json's `architectures`, which is also the class's.
ARCHITECTURES = {
    "BloomForCausalLM": Architecture("bloom", config_defaults.BLOOM, dialect="bloom"),
    "LlamaForCausalLM": Architecture("llama", config_defaults.LLAMA),
    "MistralForCausalLM": Architecture("mistral", config_defaults.MISTRAL),
    "Qwen2ForCausalLM": Architecture("qwen2", config_defaults.QWEN2),
}

# Names that a class had before a release of transformers had it; checkpoints converted then still say them.
FORMER_NAMES = {"LLaMAForCausalLM": "LlamaForCausalLM"}

# By config.json's `model_type`.
MODEL_TYPES = {entry.module: architecture for architecture, entry in ARCHITECTURES.items()}


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
