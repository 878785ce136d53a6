# SPDX-License-Identifier: Apache-2.0
"""What can be checked of a model directory without its weights: that it has a model and a tokenizer, and they agree.

No torch: the server's own processes and the launch command use this.
"""

from __future__ import annotations

from pathlib import Path

from lightllm_backend.config import EngineConfig
from lightllm_backend.models.errors import ModelError
from lightllm_backend.models.model_config import ModelConfig
from lightllm_backend.text import Tokenizer


def load_tokenizer(directory: str | Path, config: EngineConfig) -> Tokenizer:
    """The tokenizer; ModelError or TokenizerError if the directory cannot be served with it."""
    vocab_size = ModelConfig.from_directory(directory).vocab_size
    tokenizer = Tokenizer.load(directory, config.tokenizer_mode, config.trust_remote_code)
    # Fewer is usual: many models pad their embeddings to a round number.
    if tokenizer.vocab_size > vocab_size:
        raise ModelError(
            f"{directory}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, but the model's vocab_size is "
            f"{vocab_size}; at most as many are allowed: the tokenizer must belong to the model of config.json"
        )
    return tokenizer
