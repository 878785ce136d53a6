# SPDX-License-Identifier: Apache-2.0
"""The registry of architectures, without their classes, which causal_lm imports by name.

A new model is a file, its weight map, its defaults in config_defaults, and one line here.
"""

from __future__ import annotations

from typing import NamedTuple

from lightllm_backend.models import config_defaults
from lightllm_backend.models.errors import ModelError


class Architecture(NamedTuple):
    module: str  # in this folder, named like config.json's `model_type`
    defaults: config_defaults.Defaults  # of config.json's keys
    dialect: str = "llama"  # the style of its config.json: see model_config
    has_text_config: bool = False  # that key holds the text's part of config.json


# By the name in config.json's `architectures`, which is also the name of our class.
ARCHITECTURES = {
    "BloomForCausalLM": Architecture("bloom", config_defaults.BLOOM, dialect="bloom"),
    "Exaone4ForCausalLM": Architecture("exaone4", config_defaults.EXAONE4, dialect="exaone4"),
    "Gemma2ForCausalLM": Architecture("gemma2", config_defaults.GEMMA2),
    "Gemma3ForCausalLM": Architecture("gemma3_text", config_defaults.GEMMA3, dialect="gemma3"),
    "Gemma3ForConditionalGeneration": Architecture("gemma3", config_defaults.GEMMA3, "gemma3", has_text_config=True),
    "GraniteForCausalLM": Architecture("granite", config_defaults.GRANITE),
    "InternLM3ForCausalLM": Architecture("internlm3", config_defaults.INTERNLM3, dialect="internlm3"),
    "LlamaForCausalLM": Architecture("llama", config_defaults.LLAMA),
    "MinistralForCausalLM": Architecture("ministral", config_defaults.MISTRAL),
    "MistralForCausalLM": Architecture("mistral", config_defaults.MISTRAL),
    "Olmo2ForCausalLM": Architecture("olmo2", config_defaults.OLMO2),
    "Phi3ForCausalLM": Architecture("phi3", config_defaults.PHI3, dialect="phi3"),
    "Qwen2ForCausalLM": Architecture("qwen2", config_defaults.QWEN2),
    "Qwen3ForCausalLM": Architecture("qwen3", config_defaults.QWEN3),
    "SeedOssForCausalLM": Architecture("seed_oss", config_defaults.SEED_OSS),
    "SmolLM3ForCausalLM": Architecture("smollm3", config_defaults.SMOLLM3),
}

# Names from before a class was in a release of transformers; checkpoints of that time still have them.
FORMER_NAMES = {"LLaMAForCausalLM": "LlamaForCausalLM"}

# Types of which transformers 5 has a configuration alone; it builds, and saves, a LLaMA from it.
SAVED_AS_LLAMA = {"internlm3"}

# By config.json's `model_type`.
MODEL_TYPES = {entry.module: architecture for architecture, entry in ARCHITECTURES.items()}


def check_architecture(architecture: str) -> None:
    """Raise ModelError for an unknown architecture. Imports no model, hence no torch."""
    if architecture not in ARCHITECTURES:
        raise ModelError(f"the architecture {architecture!r} is not known; known: {', '.join(sorted(ARCHITECTURES))}")
