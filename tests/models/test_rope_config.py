# SPDX-License-Identifier: Apache-2.0
"""RoPE in config.json, however it is written, against transformers 5.23's class that is built from the same keys."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from lightllm_backend.models.layers import dynamic_frequencies, rotary_frequencies
from lightllm_backend.models.model_config import ModelConfig, ModelError

SHAPE = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 2, "max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ORIGINAL = {"original_max_position_embeddings": 16}
DEFAULT = {"rope_type": "default", "rope_theta": 5e5}

WRITTEN = {
    "nothing": {},
    "theta": {"rope_theta": 500},
    "linear": {"rope_scaling": {"type": "linear", "factor": 4}},
    "linear, theta beside": {"rope_scaling": {"type": "linear", "factor": 4}, "rope_theta": 500.0},
    "linear, theta beside and within": {
        "rope_scaling": {"type": "linear", "factor": 4, "rope_theta": 700.0}, "rope_theta": 500.0
    },
    "rope_type and type": {"rope_scaling": {"type": "linear", "rope_type": "dynamic", "factor": 4}},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "rope_theta": 500.0},
    "llama3": {"rope_scaling": {**LLAMA3, **ORIGINAL}},
    "llama3 without its original length": {"rope_scaling": LLAMA3},
    "llama3, original length beside": {"rope_scaling": LLAMA3, "original_max_position_embeddings": 32},
    "llama3, original length beside and within": {
        "rope_scaling": {**LLAMA3, **ORIGINAL}, "original_max_position_embeddings": 32
    },
    "parameters": {"rope_parameters": DEFAULT},
    "parameters, theta beside": {"rope_parameters": {"rope_type": "default"}, "rope_theta": 500.0},
    "parameters, theta beside and within": {"rope_parameters": DEFAULT, "rope_theta": 500.0},
    "parameters by type": {"rope_parameters": {"type": "linear", "factor": 4.0}},
    "parameters llama3": {"rope_parameters": {**LLAMA3, **ORIGINAL, "rope_theta": 5e5}},
    "null scaling": {"rope_scaling": None},
    "null parameters": {"rope_parameters": None, "rope_theta": 500.0},
    "null scaling beside parameters": {"rope_scaling": None, "rope_parameters": DEFAULT},
    "empty scaling beside parameters": {"rope_scaling": {}, "rope_parameters": DEFAULT},
    "scaling beside null parameters": {"rope_scaling": {"type": "linear", "factor": 4}, "rope_parameters": None},
    "scaling beside parameters": {"rope_scaling": {"type": "linear", "factor": 4}, "rope_parameters": DEFAULT},
    "default scaling beside linear parameters": {
        "rope_scaling": {"type": "default"},
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5},
    },
    "scaling beside parameters and theta": {
        "rope_scaling": {"type": "linear", "factor": 4}, "rope_parameters": DEFAULT, "rope_theta": 500.0
    },
    "scaling with theta beside parameters": {
        "rope_scaling": {"type": "dynamic", "factor": 4, "rope_theta": 700.0}, "rope_parameters": DEFAULT
    },
}  # fmt: skip


def ours(directory, **written) -> ModelConfig:
    (directory / "config.json").write_text(json.dumps({**SHAPE, **written}))
    return ModelConfig.from_directory(directory)


@pytest.mark.parametrize("written", WRITTEN.values(), ids=WRITTEN)
def test_frequencies_are_those_of_transformers(tmp_path, written):
    config = ours(tmp_path, **written)
    # The class changes the dictionaries that it is given.
    theirs = transformers.LlamaConfig.from_dict(copy.deepcopy({**SHAPE, **written}))
    assert config.rope_theta == theirs.rope_parameters["rope_theta"]
    assert config.rope_scaling.rope_type == theirs.rope_parameters["rope_type"]
    assert config.rope_scaling.factor == theirs.rope_parameters.get("factor", 1.0)
    rotary = LlamaRotaryEmbedding(theirs)
    torch.testing.assert_close(rotary_frequencies(config), rotary.inv_freq, rtol=1e-6, atol=0)
    if config.rope_scaling.rope_type == "dynamic":
        rotary(torch.zeros(1), torch.arange(100)[None])
        torch.testing.assert_close(dynamic_frequencies(config, 100)[-1], rotary.inv_freq, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("written", "unused"),
    [
        ({"rope_parameters": DEFAULT, "rope_scaling": None}, None),
        ({"rope_parameters": DEFAULT, "rope_scaling": DEFAULT}, None),
        ({"rope_parameters": {}, "rope_scaling": DEFAULT}, None),
        ({"rope_parameters": DEFAULT, "rope_scaling": {"type": "linear", "factor": 2}}, "'rope_theta': 500000.0"),
    ],
)
def test_parameters_that_do_not_count_are_warned_of(tmp_path, written, unused):
    warnings = [warning for warning in ours(tmp_path, **written).warnings if "rope" in warning]
    assert len(warnings) == (unused is not None)
    assert all("rope_scaling counts, and not rope_parameters" in warning and unused in warning for warning in warnings)


YARN = {"rope_type": "yarn", "factor": 4.0}
LONGROPE = {"type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16}


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"rope_scaling": YARN}, "rope_scaling.rope_type is 'yarn'; known: default, linear, dynamic, llama3"),
        ({"rope_parameters": YARN}, "rope_parameters.rope_type is 'yarn'"),
        ({"rope_parameters": DEFAULT, "rope_scaling": YARN}, "rope_scaling.rope_type is 'yarn'"),
        ({"rope_scaling": LONGROPE}, "rope_scaling.type is 'longrope'"),
        ({"rope_scaling": {"type": "su"}}, "rope_scaling.type is 'su'"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]}}, "rope_scaling.type is 'mrope'"),
        ({"rope_parameters": {"rope_type": "proportional"}}, "rope_parameters.rope_type is 'proportional'"),
        ({"rope_scaling": {"factor": 4.0}}, "rope_scaling.rope_type is missing; known: default"),
        ({"rope_scaling": {"rope_type": ["linear"], "factor": 4.0}}, r"rope_type is \['linear'\]; known"),
        ({"rope_scaling": {"type": "linear", "factor": None}}, "rope_scaling.factor is null; a number above 0"),
        ({"rope_scaling": {"type": "linear", "factor": 4, "rope_theta": None}}, "rope_scaling.rope_theta is null"),
        ({"rope_theta": None}, "rope_theta is null; a number above 0"),
        ({"rope_theta": "1e4"}, "rope_theta is '1e4'; a number above 0"),
        ({"rope_parameters": {**DEFAULT, "partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5; 1 is needed"),
        (
            {"rope_parameters": {"full_attention": DEFAULT, "sliding_attention": DEFAULT}},
            "rope_parameters.full_attention is {.*}; the same parameters for all layers",
        ),
    ],
)
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
def test_what_is_not_known_is_refused_and_never_left_out(tmp_path, model_type, written, message):
    with pytest.raises(ModelError, match=message):
        ours(tmp_path, **{"num_key_value_heads": 2, **written, "model_type": model_type})
