# SPDX-License-Identifier: Apache-2.0
"""Little random models of each family, in the form in which Hugging Face's directories have them."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import transformers

VOCAB = 199  # an odd size
WINDOW = 4  # shorter than most prompts

_COMMON = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA = {
    **_COMMON,
    "hidden_size": 64,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

FAMILIES: dict[str, transformers.PretrainedConfig] = {
    **{
        f"bloom_{heads}_heads": transformers.BloomConfig(**_COMMON, hidden_size=heads * 16, n_layer=3, n_head=heads)
        for heads in (6, 8, 12)
    },
    "gemma2": transformers.Gemma2Config(
        **_LLAMA,
        head_dim=32,
        sliding_window=WINDOW,
        query_pre_attn_scalar=24,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=5.0,
    ),
    "gemma3": transformers.Gemma3TextConfig(
        **{**_LLAMA, "num_key_value_heads": 4},
        head_dim=16,
        query_pre_attn_scalar=24,
        attention_bias=True,
        tie_word_embeddings=False,
        sliding_window=WINDOW,
        sliding_window_pattern=2,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    ),
    "llama2_gqa": transformers.LlamaConfig(**_LLAMA),
    "llama3": transformers.LlamaConfig(**{**_LLAMA, "eos_token_id": [2, 5]}, rope_parameters=_LLAMA3_ROPE),
    "mistral": transformers.MistralConfig(**_LLAMA, sliding_window=None),
    "mistral_window": transformers.MistralConfig(**_LLAMA, sliding_window=WINDOW),
    "phi3": transformers.Phi3Config(
        **_LLAMA,
        pad_token_id=0,
        sliding_window=WINDOW,
        partial_rotary_factor=0.75,
        original_max_position_embeddings=64,
        rope_parameters={"rope_type": "longrope", "short_factor": [1.1] * 6, "long_factor": [1.0, 2.0, 5.0] * 2},
    ),
    "qwen2": transformers.Qwen2Config(**_LLAMA, sliding_window=WINDOW),
    "qwen2_window": transformers.Qwen2Config(
        **_LLAMA, sliding_window=WINDOW, use_sliding_window=True, max_window_layers=1
    ),
    "qwen3": transformers.Qwen3Config(**_LLAMA, head_dim=24, tie_word_embeddings=True),
    "qwen3_window": transformers.Qwen3Config(
        **{**_LLAMA, "num_key_value_heads": 4},
        head_dim=16,
        attention_bias=True,
        sliding_window=WINDOW,
        use_sliding_window=True,
        max_window_layers=1,
    ),
}


FAMILIES |= {
    # The second layer has no window and no rotary embeddings.
    "exaone4": transformers.Exaone4Config(**_LLAMA, head_dim=24, sliding_window=WINDOW, sliding_window_pattern=2),
    "exaone4_no_window": transformers.Exaone4Config(
        **_LLAMA, sliding_window=None, sliding_window_pattern=None, layer_types=["full_attention"] * 3
    ),
    "granite": transformers.GraniteConfig(
        **_LLAMA, embedding_multiplier=2.5, attention_multiplier=0.3, residual_multiplier=0.4, logits_scaling=0.5
    ),
    "ministral": transformers.MinistralConfig(
        **_LLAMA,
        head_dim=24,
        tie_word_embeddings=True,
        sliding_window=WINDOW,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    ),
    "olmo2": transformers.Olmo2Config(**_LLAMA, attention_bias=True),
    "seed_oss": transformers.SeedOssConfig(
        **_LLAMA, head_dim=24, attention_bias=False, attention_out_bias=True, mlp_bias=True
    ),
    # The second layer has no rotary embeddings, and a window.
    "smollm3": transformers.SmolLM3Config(
        **_LLAMA, pad_token_id=0, no_rope_layer_interval=2, use_sliding_window=True, sliding_window=WINDOW
    ),
}


if hasattr(transformers, "InternLM3Config"):  # not in transformers 5.17
    FAMILIES["internlm3"] = transformers.InternLM3Config(**_LLAMA, head_dim=24, attention_bias=True, mlp_bias=True)


def random_model(family: str, vocab_size: int = VOCAB) -> transformers.PreTrainedModel:
    """Every parameter is drawn, biases as well; far apart logits, so that ties do not decide."""
    config = copy.deepcopy(FAMILIES[family])
    config.vocab_size = vocab_size
    # Not the default attention: that of transformers 5.20 leaves out Gemma 2's soft cap.
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = ("norm" in name or "ln_f" in name) and name.endswith("weight")
            from_one = is_norm and not family.startswith("gemma")
            parameter.normal_(1.0 if from_one else 0.0, 0.2, generator=generator)
    return model


def save_random_model(family: str, directory: Path, vocab_size: int = VOCAB) -> Path:
    random_model(family, vocab_size).save_pretrained(directory)
    return directory
