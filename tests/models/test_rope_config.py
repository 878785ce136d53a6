# SPDX-License-Identifier: Apache-2.0
"""RoPE in config.json, however it is written, against transformers 5.23's class that is built from the same keys."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from lightllm_backend.models.model_config import ModelConfig, ModelError
from lightllm_backend.models.rotary import RotaryEmbedding

SHAPE = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 2, "max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ORIGINAL = {"original_max_position_embeddings": 16}
DEFAULT = {"rope_type": "default", "rope_theta": 5e5}
YARN = {"rope_type": "yarn", "factor": 4.0}
LONGROPE = {
    "type": "longrope",
    "short_factor": [1 + index / 32 for index in range(16)],
    "long_factor": [1 + index / 2 for index in range(16)],
}

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
    "a partial factor that the class does not heed": {"partial_rotary_factor": 0.5},
    "yarn": {"rope_scaling": {**YARN, **ORIGINAL}},
    "yarn without its original length": {"rope_scaling": YARN},
    "yarn, original length beside and within": {
        "rope_scaling": {**YARN, **ORIGINAL}, "original_max_position_embeddings": 32
    },
    "yarn, a factor that is not the ratio of the lengths": {"rope_scaling": {**YARN, **ORIGINAL, "factor": 9.5}},
    "yarn, factor null": {"rope_scaling": {**YARN, **ORIGINAL, "factor": None}},
    "yarn, factor null, of more positions than are left": {
        "rope_scaling": {**YARN, "original_max_position_embeddings": 100, "factor": None}
    },
    "yarn, factor 1": {"rope_scaling": {**YARN, **ORIGINAL, "factor": 1}},
    "yarn, attention factor": {"rope_scaling": {**YARN, **ORIGINAL, "attention_factor": 1.7, "mscale": 2.0}},
    "yarn, attention factor null": {"rope_scaling": {**YARN, **ORIGINAL, "attention_factor": None}},
    "yarn, mscale alone": {"rope_scaling": {**YARN, **ORIGINAL, "mscale": 0.7}},
    "yarn, mscale of all": {"rope_scaling": {**YARN, **ORIGINAL, "mscale": 0.7, "mscale_all_dim": 1.2}},
    "yarn, mscale of all 0": {"rope_scaling": {**YARN, **ORIGINAL, "mscale": 0.7, "mscale_all_dim": 0}},
    "yarn, betas": {"rope_scaling": {**YARN, **ORIGINAL, "beta_fast": 4, "beta_slow": 0.3}},
    "yarn, betas that are equal": {"rope_scaling": {**YARN, **ORIGINAL, "beta_fast": 2, "beta_slow": 2}},
    "yarn, betas null": {"rope_scaling": {**YARN, **ORIGINAL, "beta_fast": None, "beta_slow": 0}},
    "yarn, not truncated": {"rope_scaling": {**YARN, **ORIGINAL, "beta_fast": 4, "truncate": False}},
    "yarn of few positions": {"rope_scaling": {**YARN, "original_max_position_embeddings": 3}},
    "yarn, a large base": {"rope_parameters": {**YARN, **ORIGINAL, "rope_theta": 1e6}},
    "longrope": {"rope_scaling": {**LONGROPE, **ORIGINAL}},
    "longrope, original length beside": {"rope_scaling": LONGROPE, "original_max_position_embeddings": 32},
    "longrope without its original length": {"rope_scaling": LONGROPE},
    "longrope, factor": {"rope_scaling": {**LONGROPE, **ORIGINAL, "factor": 2.5}},
    "longrope, attention factor": {"rope_scaling": {**LONGROPE, **ORIGINAL, "factor": 2.5, "attention_factor": 1}},
}  # fmt: skip


def ours(directory, **written) -> ModelConfig:
    (directory / "config.json").write_text(json.dumps({**SHAPE, **written}))
    return ModelConfig.from_directory(directory)


@pytest.mark.parametrize("written", WRITTEN.values(), ids=WRITTEN)
def test_rotations_are_those_of_transformers(tmp_path, written):
    """The prompts end below, at and beyond each length at which a rotation changes."""
    check_rotations(ours(tmp_path, **written), LlamaRotaryEmbedding(theirs(transformers.LlamaConfig, written)))


def theirs(config_class, written) -> transformers.PretrainedConfig:
    """The class changes the dictionaries that it is given."""
    return config_class.from_dict(copy.deepcopy({**SHAPE, **written}))


def check_rotations(config: ModelConfig, rotary: torch.nn.Module) -> None:
    (rope,) = set(config.ropes)
    for length in (2, 15, 16, 17, 32, 33, 64, 65, 100):
        positions = torch.arange(length, dtype=torch.int32)
        cos, sin, _ = RotaryEmbedding(rope, 100, torch.device("cpu"))(positions, torch.full_like(positions, length))
        for own, expected in zip((cos, sin), rotary(torch.zeros(1), positions[None]), strict=True):
            torch.testing.assert_close(own, expected[0, :, : own.shape[1]], rtol=1e-5, atol=2e-5)


PHI3 = {**LONGROPE, "short_factor": [1.0, 1.1, 1.2, 1.3] * 3, "long_factor": [1.0, 2.0, 9.0, 30.0] * 3}
BESIDE = {"original_max_position_embeddings": 16, "partial_rotary_factor": 0.75}


@pytest.mark.parametrize(
    "written",
    [
        {"partial_rotary_factor": 0.75},
        {"partial_rotary_factor": 0.7},  # 22 of 32 dimensions
        {"partial_rotary_factor": 0.72},  # 23, which is rounded up
        {"rope_scaling": PHI3, **BESIDE},
        {"rope_scaling": {**PHI3, "type": "yarn"}, **BESIDE},
        {"rope_scaling": {**PHI3, "partial_rotary_factor": 0.75}, "original_max_position_embeddings": 32},
        {"rope_scaling": {**PHI3, **ORIGINAL}, "partial_rotary_factor": 0.75},  # the class's 4096 counts more
    ],
)
def test_rotations_of_phi3_are_those_of_transformers(tmp_path, written):
    config = ours(tmp_path, **{**written, "model_type": "phi3"})
    check_rotations(config, Phi3RotaryEmbedding(theirs(transformers.Phi3Config, {**written, "model_type": "phi3"})))


def test_the_first_files_of_phi3_call_longrope_su(tmp_path):
    """transformers 5.23 then does not look for the original length beside the object, where these files have it."""
    su, longrope = (
        ours(tmp_path, model_type="phi3", rope_scaling={**PHI3, "type": name}, **BESIDE) for name in ("su", "longrope")
    )
    assert su.ropes == longrope.ropes
    assert su.ropes[0].rope_type == "longrope"
    with pytest.raises(ModelError, match="rope_scaling.type is 'linear'; known: default, longrope, su, yarn"):
        ours(tmp_path, model_type="phi3", rope_scaling={"type": "linear", "factor": 2.0})
    with pytest.raises(ModelError, match="rope_scaling.long_factor is missing; a list of 16 numbers"):
        ours(tmp_path, model_type="phi3", rope_scaling={"type": "yarn", "factor": 2.0, "short_factor": [1.0] * 16})


BY_TYPE = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}, "sliding_attention": {}}


@pytest.mark.parametrize(
    "written",
    [
        {},
        {"rope_theta": 2e6, "rope_local_base_freq": 500.0},
        {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_theta": 2e6},
        {"rope_parameters": BY_TYPE},
        {"rope_parameters": BY_TYPE, "rope_theta": 3e6, "rope_local_base_freq": 300.0},
        {"rope_parameters": {**BY_TYPE, "full_attention": None}, "rope_theta": 3e6},
        {"rope_parameters": {"full_attention": {**YARN, **ORIGINAL}, "sliding_attention": DEFAULT}},
    ],
)
def test_rotations_of_each_type_of_layer_are_those_of_transformers(tmp_path, written):
    shape = {"head_dim": 32, "num_key_value_heads": 2, "model_type": "gemma3_text", "num_hidden_layers": 6}
    config = ours(tmp_path, **shape, **written)
    rotary = Gemma3RotaryEmbedding(theirs(transformers.Gemma3TextConfig, {**shape, **written}))
    positions = torch.arange(100, dtype=torch.int32)
    for layer, name in ((0, "sliding_attention"), (5, "full_attention")):
        own = RotaryEmbedding(config.ropes[layer], 100, torch.device("cpu"))(positions, positions + 1)
        for one, other in zip(own[:2], rotary(torch.zeros(1), positions[None], name), strict=True):
            torch.testing.assert_close(one, other[0, :, :16], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"rope_parameters": DEFAULT}, "rope_parameters.rope_type is 'default'; parameters within full_attention and"),
        ({"rope_scaling": {"type": "linear", "factor": 8.0}}, "rope_scaling.rope_type is missing; a type is needed"),
        ({"rope_parameters": {"full_attention": {**YARN, "truncate": False}}}, "truncate is False; true is needed"),
        ({"rope_parameters": {"full_attention": LONGROPE}}, "full_attention.type is 'longrope'; known: default, lin"),
        ({"rope_parameters": {"full_attention": 5}}, "full_attention is 5; an object is needed"),
    ],
)
def test_what_is_not_known_of_a_type_of_layer_is_refused(tmp_path, written, message):
    with pytest.raises(ModelError, match=message):
        ours(tmp_path, head_dim=32, num_key_value_heads=2, **{**written, "model_type": "gemma3_text"})


def test_a_base_for_each_type_of_layer_is_refused_by_a_class_without_it(tmp_path):
    with pytest.raises(ModelError, match="rope_parameters.full_attention is {.*}; the same parameters for all layers"):
        ours(tmp_path, rope_parameters={"full_attention": DEFAULT, "sliding_attention": DEFAULT})


@pytest.mark.parametrize(
    ("written", "unused"),
    [
        ({"rope_parameters": DEFAULT, "rope_scaling": None}, None),
        ({"rope_parameters": DEFAULT, "rope_scaling": DEFAULT}, None),
        ({"rope_parameters": {}, "rope_scaling": DEFAULT}, None),
        (
            {"rope_parameters": DEFAULT, "rope_scaling": {"type": "linear", "factor": 2}},
            "rope_scaling counts, and not rope_parameters beside it, {'rope_type': 'default', 'rope_theta': 500000.0}",
        ),
        (
            {"rope_scaling": {**YARN, "attn_factor": 2.0}},
            "rope_scaling.attn_factor is not read for RoPE of the type 'yarn'",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not read: all dimensions of a head turn"),
        ({"partial_rotary_factor": 1.0}, None),
    ],
)
def test_parameters_that_do_not_count_are_warned_of(tmp_path, written, unused):
    warnings = [warning for warning in ours(tmp_path, **written).warnings if "rope" in warning or "rotary" in warning]
    assert [warning.partition(": ")[2] for warning in warnings] == ([] if unused is None else [unused])


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"rope_scaling": {**YARN, "factor": 0.5}}, "rope_scaling.factor is 0.5; a number of at least 1"),
        ({"rope_scaling": {**YARN, "beta_fast": 1, "beta_slow": 2}}, "beta_fast is 1; .*at least beta_slow, 2.0"),
        ({"rope_scaling": {**YARN, "truncate": "no"}}, "rope_scaling.truncate is 'no'; true or false"),
        ({"rope_scaling": {**YARN, "rope_theta": 1}}, "rope_scaling.rope_theta is 1; YaRN needs a base above 1"),
        ({"rope_scaling": {**YARN, "attention_factor": 0}}, "attention_factor is 0; a number above 0"),
        ({"rope_scaling": {**LONGROPE, "long_factor": [1.0]}}, "long_factor is .*; a list of 16 numbers above 0"),
        ({"rope_scaling": {**LONGROPE, "long_factor": [0.0] * 16}}, "rope_scaling.long_factor.0 is 0.0; a number"),
        ({"rope_scaling": {**LONGROPE, "short_factor": None}}, "short_factor is null; a list of 16"),
        ({"rope_scaling": {**LONGROPE, "original_max_position_embeddings": 1}}, "at least 2 is needed"),
        ({"rope_scaling": {"type": "su"}}, "rope_scaling.type is 'su'"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]}}, "rope_scaling.type is 'mrope'"),
        ({"rope_parameters": {"rope_type": "proportional"}}, "rope_parameters.rope_type is 'proportional'"),
        ({"rope_scaling": {"factor": 4.0}}, "rope_scaling.rope_type is missing; known: default"),
        ({"rope_scaling": {"rope_type": ["linear"], "factor": 4.0}}, r"rope_type is \['linear'\]; known"),
        ({"rope_scaling": {"type": "linear", "factor": None}}, "rope_scaling.factor is null; a number above 0"),
        ({"rope_scaling": {"type": "linear", "factor": 4, "rope_theta": None}}, "rope_scaling.rope_theta is null"),
        ({"rope_theta": None}, "rope_theta is null; a number above 0"),
        ({"rope_theta": "1e4"}, "rope_theta is '1e4'; a number above 0"),
        (
            {"rope_parameters": {**YARN, "partial_rotary_factor": 0.5}},
            "rope_parameters.partial_rotary_factor is 0.5; 1 is needed",
        ),
    ],
)
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
def test_what_is_not_known_is_refused_and_never_left_out(tmp_path, model_type, written, message):
    with pytest.raises(ModelError, match=message):
        ours(tmp_path, **{"num_key_value_heads": 2, **written, "model_type": model_type})
