# SPDX-License-Identifier: Apache-2.0
"""The defaults of keys that config.json leaves out: those of transformers' configuration classes, version 5.23.

A class does not have the keys that are not in its table. A default of None depends on other keys.
"""

from __future__ import annotations

from collections.abc import Mapping

Defaults = Mapping[str, object]

_LLAMA_AND_MISTRAL: Defaults = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_parameters": None,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

LLAMA: Defaults = {
    **_LLAMA_AND_MISTRAL,
    "intermediate_size": 11008,
    "num_key_value_heads": None,
    "max_position_embeddings": 2048,
    "attention_bias": False,
    "mlp_bias": False,
}

MISTRAL: Defaults = {
    **_LLAMA_AND_MISTRAL,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
    "layer_types": None,
}

QWEN2: Defaults = {
    **_LLAMA_AND_MISTRAL,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
    "bos_token_id": None,
    "eos_token_id": None,
}

QWEN3: Defaults = {**QWEN2, "head_dim": 128, "attention_bias": False}

PHI3: Defaults = {
    **_LLAMA_AND_MISTRAL,
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_key_value_heads": None,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "partial_rotary_factor": 1.0,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
    "eos_token_id": 32000,
}

BLOOM: Defaults = {
    "vocab_size": 250880,
    "hidden_size": 64,
    "n_layer": 2,
    "n_head": 8,
    "layer_norm_epsilon": 1e-5,
    "apply_residual_connection_post_layernorm": False,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
