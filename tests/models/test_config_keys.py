# SPDX-License-Identifier: Apache-2.0
"""Every key that transformers 5.23 reads of a class's config.json is read here, has no effect, or is refused."""

from __future__ import annotations

import ast
import copy
import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, cache_utils, masking_utils

from lightllm_backend.models.model_config import ModelConfig, ModelError
from lightllm_backend.models.registry import ARCHITECTURES
from lightllm_backend.models.unsupported import FIXED_KEYS
from tests.models.random_models import FAMILIES, VOCAB, random_model

# Read here, though no default of it is in the tables.
ALSO_READ = {"architectures", "dtype", "eos_token_id", "num_hidden_layers", "num_attention_heads", "layer_types"}

# Without effect on logits, and values that are not the defaults.
TRAINING, PLACES, LABELS, CALLS, SPEED = "training", "row of embeddings", "classifiers", "what a call returns", "speed"
NO_EFFECT = {
    "attention_dropout": (TRAINING, 0.5),
    "classifier_dropout": (TRAINING, 0.5),
    "embd_pdrop": (TRAINING, 0.5),
    "hidden_dropout": (TRAINING, 0.5),
    "resid_pdrop": (TRAINING, 0.5),
    "residual_dropout": (TRAINING, 0.5),
    "initializer_range": (TRAINING, 0.9),
    "pad_token_id": (PLACES, 5),
    "id2label": (LABELS, {"0": "a", "1": "b", "2": "c"}),
    "label2id": (LABELS, {"a": 0, "b": 1, "c": 2}),
    "num_labels": (LABELS, 3),
    "problem_type": (LABELS, "regression"),
    "output_attentions": (CALLS, False),
    "output_hidden_states": (CALLS, True),
    "return_dict": (CALLS, True),
    "transformers_version": (CALLS, "4.57.0"),
    "use_cache": (CALLS, True),
    "_attn_implementation": (SPEED, "sdpa"),
    "chunk_size_feed_forward": (SPEED, 3),
    "pretraining_tp": (SPEED, 2),
    "slow_but_exact": (SPEED, False),  # true leaves out biases where pretraining_tp is above 1
}

# What Gemma 3 needs for images.
OF_IMAGES = {
    "text_config", "vision_config", "mm_tokens_per_image", "image_token_id", "image_token_index", "boi_token_index",
    "eoi_token_index",
}  # fmt: skip


def read_of_config(source: str) -> set[str]:
    """The attributes of a variable or attribute called `config` that a module reads."""

    def is_config(node: ast.AST) -> bool:
        return (isinstance(node, ast.Name) and node.id == "config") or (
            isinstance(node, ast.Attribute) and node.attr == "config"
        )

    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and is_config(node.value):
            found.add(node.attr)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            owner, name = node.args[:2]
            if is_config(owner) and isinstance(name, ast.Constant):
                found.add(name.value)
    return found


def config_of(architecture: str) -> type[transformers.PretrainedConfig]:
    """The configuration class of an architecture."""
    return CONFIG_MAPPING[ARCHITECTURES[architecture].module]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_key_is_unknown(architecture):
    config_class = config_of(architecture)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    keys = {field.name for field in dataclasses.fields(config_class)}
    for module in (sys.modules[model_class.__module__], masking_utils, cache_utils):
        keys |= read_of_config(Path(module.__file__).read_text(encoding="utf-8"))
    keys = {key for key in keys if not callable(getattr(config_class, key, None))}
    known = {*ARCHITECTURES[architecture].defaults, *ALSO_READ, *NO_EFFECT, *FIXED_KEYS}
    # A window in a file of a class that has none: transformers' cache heeds it, its masks do not. We warn.
    known |= {"sliding_window", "rope_parameters"}
    if "Gemma3" in architecture:
        known |= OF_IMAGES
    assert keys <= known


@pytest.mark.parametrize("family", ["bloom_6_heads", "llama2_gqa", "phi3", "seed_oss"])
def test_keys_without_effect_change_no_logit(family):
    ids = torch.arange(3, 20)[None]
    values = {key: value for key, (_, value) in NO_EFFECT.items() if key not in ("_attn_implementation", "return_dict")}
    plain = random_model(family)
    changed = type(plain)(type(plain.config).from_dict({**copy.deepcopy(plain.config.to_dict()), **values})).eval()
    changed.load_state_dict(plain.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(changed(ids).logits, plain(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("is_causal", False),
        ("is_encoder_decoder", True),
        ("use_bidirectional_attention", True),
        ("attention_chunk_size", 4),
        ("kv_sharing_modes", ["reuse", None]),
        ("per_layer_config", {"0": {"head_dim": 8}}),
        ("rope_interleaved", True),
    ],
)
@pytest.mark.parametrize("family", ["bloom_6_heads", "llama2_gqa"])
def test_fixed_keys_are_refused_by_name(tmp_path, family, key, value):
    config = FAMILIES[family].to_dict()
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family]).__class__.__name__
    config["architectures"] = [model]
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": VOCAB, key: FIXED_KEYS[key][0]}))
    ModelConfig.from_directory(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(ModelError, match=f"{key} is .*; .* is needed"):
        ModelConfig.from_directory(tmp_path)
