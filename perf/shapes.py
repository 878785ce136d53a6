# SPDX-License-Identifier: Apache-2.0
"""The config.json of models that the benchmarks make out of random weights: speed depends on shape alone."""

from __future__ import annotations

from typing import Any


def _llama(
    layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, vocab: int = 32000
) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": intermediate,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab,
        "max_position_embeddings": 16384, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip


def _bloom(layers: int, hidden: int, heads: int, vocab: int = 250880) -> dict[str, Any]:
    return {
        "architectures": ["BloomForCausalLM"], "model_type": "bloom",
        "n_layer": layers, "hidden_size": hidden, "n_head": heads, "vocab_size": vocab, "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip


SHAPES = {
    "tiny": _llama(2, 128, 256, 4, 2, 1000),  # to try the benchmarks themselves
    "llama-7b": _llama(32, 4096, 11008, 32, 32),
    "llama-13b": _llama(40, 5120, 13824, 40, 40),
    "llama-2-70b": _llama(80, 8192, 28672, 64, 8),
    "llama-3-8b": _llama(32, 4096, 14336, 32, 8, 128256),
    "llama-3.1-8b": _llama(32, 4096, 14336, 32, 8, 128256) | {
        "max_position_embeddings": 131072, "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "qwen3-8b": _llama(36, 4096, 12288, 32, 8, 151936) | {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 128,
        "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
    },
    "gemma-3-12b": _llama(48, 3840, 15360, 16, 8, 262208) | {
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256, "tie_word_embeddings": True,
        "sliding_window": 1024, "sliding_window_pattern": 6, "max_position_embeddings": 131072, "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "bloom-7b1": _bloom(30, 4096, 32),
}  # fmt: skip
SHAPES["gemma-3-12b-full"] = SHAPES["gemma-3-12b"] | {"sliding_window_pattern": 1}  # the same without windows


def rank_shape(config: dict[str, Any], tp: int) -> dict[str, Any]:
    """The part of one of `tp` ranks, as the config.json of a model whose products are the rank's."""
    heads = config.get("num_attention_heads") or config["n_head"]
    if tp == 1:
        return config
    if "intermediate_size" not in config:
        raise ValueError(f"tp is {tp}; allowed: 1, since the parts of a BLOOM are no BLOOM")
    return config | {
        "head_dim": config.get("head_dim", config["hidden_size"] // heads),
        "num_attention_heads": heads // tp,
        "num_key_value_heads": max(1, config.get("num_key_value_heads", heads) // tp),
        "intermediate_size": config["intermediate_size"] // tp,
        "vocab_size": -(-config["vocab_size"] // (8 * tp)) * 8,
    }


# Settings with which the stored figures were measured, unless a benchmark has longer requests: what a start takes and
# how many tokens the KV pool holds depend on them.
LENGTHS = {"max_req_input_len": 2048, "max_req_total_len": 3072}
