# SPDX-License-Identifier: Apache-2.0
"""The registry of architectures, without their classes, which causal_lm imports by name.

A new model is a file, its weight map, its defaults in config_defaults, and one line here.
"""

from __future__ import annotations

from typing import NamedTuple

from lightllm_backend.models import config_defaults
from lightllm_backend.models.errors import ModelError


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
