# SPDX-License-Identifier: Apache-2.0
"""Loads the tokenizer of a model directory and checks it against the model's config.json, without the weights.

Imports no torch: the server's own processes and the launch command use this module.
"""

from __future__ import annotations

import logging
from pathlib import Path

from lightllm_backend.config import EngineConfig
from lightllm_backend.lengths import LengthLimits
from lightllm_backend.models.model_config import ModelConfig
from lightllm_backend.text.tokenizer import Tokenizer

_MAX_TOKENS_NAMED = 10

log = logging.getLogger("lightllm")


def load_tokenizer(directory: str | Path, config: EngineConfig) -> Tokenizer:
    """Load the tokenizer; raise ModelError or TokenizerError if the server cannot serve the directory."""
    if config.trust_remote_code:
        log.warning("trust_remote_code is true: code from %s may run in this process, with all its rights", directory)
    vocab_size = ModelConfig.from_directory(directory).vocab_size
    return Tokenizer.load(directory, config.tokenizer_mode, config.trust_remote_code, vocab_size)


def known_lengths(directory: str | Path, config: EngineConfig) -> LengthLimits:
    """Return the limits by the settings and config.json; the engine's may be lower, by the size of its KV pool."""
    return LengthLimits.of(config, ModelConfig.from_directory(directory).max_sequence_length)


def warning_of_tokens_past_model(tokenizer: Tokenizer) -> str | None:
    """Return a warning if the tokenizer has more tokens than the model's embedding, else None."""
    past_model = tokenizer.tokens_past_model
    if not past_model:
        return None
    names = [f"{token_id} ({token})" for token_id, token in list(past_model.items())[:_MAX_TOKENS_NAMED]]
    others = f" and {len(past_model) - len(names)} more" if len(past_model) > len(names) else ""
    return (
        f"the tokenizer has ids past the model's vocab_size of {min(past_model)}: {', '.join(names)}{others}; "
        "prompts that hold one are refused"
    )
