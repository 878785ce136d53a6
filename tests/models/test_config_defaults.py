# SPDX-License-Identifier: Apache-2.0
"""Keys that config.json leaves out or sets to null mean what they mean to transformers 5.23's configuration classes."""

from __future__ import annotations

import dataclasses
import json

import pytest
import transformers
from huggingface_hub.errors import StrictDataclassError

from lightllm_backend.models.layer_types import LAYER_TYPES
from lightllm_backend.models.model_config import SIZES, UNLIMITED_POSITIONS, ModelConfig, ModelError
from lightllm_backend.models.registry import ARCHITECTURES, SAVED_AS_LLAMA
from lightllm_backend.models.rope import Rope
from lightllm_backend.models.unsupported import FIXED_KEYS

# A model that takes images has its text part's configuration within its own.
CLASSES = {
    architecture: transformers.CONFIG_MAPPING[entry.module]
    for architecture, entry in ARCHITECTURES.items()
    if architecture != "Gemma3ForConditionalGeneration"
}

# What has no part in serving a model: training, caching, and what generate() pads with.
UNUSED = {
    "attention_dropout", "hidden_dropout", "initializer_range", "pad_token_id", "pretraining_tp", "slow_but_exact",
    "use_cache", "resid_pdrop", "residual_dropout", "embd_pdrop",
}  # fmt: skip

# The shape of a small model, of which one key at a time is left out. Qwen2's window begins within its layers.
SMALL = {
    "vocab_size": 1000, "hidden_size": 512, "intermediate_size": 96, "num_hidden_layers": 30,
    "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 32, "hidden_act": "silu",
    "max_position_embeddings": 300, "rms_norm_eps": 1e-3, "rope_theta": 100.0, "tie_word_embeddings": True,
    "attention_bias": True, "mlp_bias": True, "sliding_window": 12, "use_sliding_window": True, "max_window_layers": 29,
    "bos_token_id": 7, "eos_token_id": 8,
}  # fmt: skip
SMALL_GEMMA = {
    **SMALL, "num_key_value_heads": 4, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 25,
    "final_logit_softcapping": 9.0,
}  # fmt: skip
SMALL_BLOOM = {
    "vocab_size": 1000, "hidden_size": 512, "n_layer": 3, "n_head": 16, "layer_norm_epsilon": 1e-3,
    "apply_residual_connection_post_layernorm": False, "tie_word_embeddings": False, "bos_token_id": 7,
    "eos_token_id": 8,
}  # fmt: skip


def small(architecture):
    values = SMALL_GEMMA if "Gemma" in architecture else SMALL_BLOOM if architecture == "BloomForCausalLM" else SMALL
    if architecture == "InternLM3ForCausalLM":  # has both biases or none
        values = {**values, "attention_bias": False, "mlp_bias": False}
    if architecture == "SeedOssForCausalLM":
        values = {**values, "attention_bias": False, "attention_out_bias": True}
    return {"model_type": CLASSES[architecture].model_type, **values}


KEYS = [(architecture, key) for architecture in CLASSES for key in small(architecture) if key != "model_type"]

# Nulls with a meaning that transformers' strict types or its models do not let through: see docs/compatibility.md.
NULLS_OF_OUR_OWN = {
    **{
        (architecture, key): meaning
        for architecture in ("Exaone4ForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM")
        for key, meaning in (("num_key_value_heads", {"num_kv_heads": 32}), ("head_dim", {"head_dim": 16}))
    },
    ("Exaone4ForCausalLM", "sliding_window"): {
        "sliding_window": None,
        "sliding_layers": (),
        "ropes": (Rope(32, 100.0),) * 30,
    },
    ("GraniteForCausalLM", "head_dim"): {"head_dim": 16},
    ("MinistralForCausalLM", "num_key_value_heads"): {"num_kv_heads": 32},
    ("MistralForCausalLM", "num_key_value_heads"): {"num_kv_heads": 32},
    ("Olmo2ForCausalLM", "head_dim"): {"head_dim": 16},
    ("Phi3ForCausalLM", "head_dim"): {"head_dim": 16},
    ("Qwen2ForCausalLM", "head_dim"): {"head_dim": 16},
    ("Qwen3ForCausalLM", "head_dim"): {"head_dim": 16},
    ("SmolLM3ForCausalLM", "head_dim"): {"head_dim": 16},
}

# The layers that have rotary embeddings, for classes of which some have none.
ROTATING = {
    "Exaone4ForCausalLM": lambda config: [
        config.sliding_window is None or kind == "sliding_attention" for kind in config.layer_types
    ],
    "SmolLM3ForCausalLM": lambda config: config.no_rope_layers,
}

# What a configuration class raises for a null: of its checks of types and values, and of arithmetic in __post_init__.
REFUSALS = (StrictDataclassError, ArithmeticError, AttributeError, TypeError, ValueError)


def ours(directory, values) -> ModelConfig:
    (directory / "config.json").write_text(json.dumps(values))
    return ModelConfig.from_directory(directory)


def theirs(architecture, values) -> transformers.PretrainedConfig:
    return CLASSES[architecture].from_dict(dict(values))


def expected(architecture, config) -> dict:
    """The fields of ModelConfig as `config`, of transformers' class, has them."""
    eos = config.eos_token_id
    common = {
        "architecture": architecture,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_layers": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_id": config.bos_token_id,
        "eos_ids": () if eos is None else (eos,),
        "torch_dtype": None,
    }
    if architecture == "BloomForCausalLM":
        return common | {
            "intermediate_size": 4 * config.hidden_size,
            "num_kv_heads": config.n_head,
            "head_dim": config.hidden_size // config.n_head,
            "norm_eps": config.layer_norm_epsilon,
            "max_sequence_length": UNLIMITED_POSITIONS,
            "attention_bias": True,
            "mlp_bias": True,
        }
    is_gemma = "Gemma" in architecture
    assert config.hidden_activation == "gelu_pytorch_tanh" if is_gemma else config.hidden_act == "silu"
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    table = ARCHITECTURES[architecture].defaults
    declared = {field.name for field in dataclasses.fields(config)}
    window = config.sliding_window if "sliding_window" in declared else None
    if "use_sliding_window" in declared and not config.use_sliding_window:
        window = None
    # A class without types of layers has its window in all of them.
    types = config.layer_types if "layer_types" in declared else ["sliding_attention"] * config.num_hidden_layers
    rotating = ROTATING[architecture](config) if architecture in ROTATING else [True] * config.num_hidden_layers
    ropes = config.rope_parameters
    by_type = ropes if ropes.keys() == set(LAYER_TYPES) else dict.fromkeys(LAYER_TYPES, ropes)
    if is_gemma:
        common |= {
            "attention_scale": config.query_pre_attn_scalar**-0.5,
            "attention_softcap": config.attn_logit_softcapping,
            "logit_softcap": config.final_logit_softcapping,
        }
    if architecture == "GraniteForCausalLM":
        common |= {
            "attention_scale": config.attention_multiplier,
            "embedding_multiplier": config.embedding_multiplier,
            "residual_multiplier": config.residual_multiplier,
            "logit_divisor": config.logits_scaling,
        }
    if architecture == "SeedOssForCausalLM":
        common |= {"attention_out_bias": config.attention_out_bias}
    return common | {
        "intermediate_size": config.intermediate_size,
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": head_dim,
        "norm_eps": config.rms_norm_eps,
        "max_sequence_length": config.max_position_embeddings,
        "attention_bias": "attention_bias" in table and config.attention_bias,
        "mlp_bias": "mlp_bias" in table and config.mlp_bias,
        "ropes": tuple(
            Rope(head_dim, by_type[layer_type]["rope_theta"]) if rotates else Rope(0)
            for layer_type, rotates in zip(types, rotating, strict=True)
        ),
        "sliding_window": window,
        "sliding_layers": () if window is None else tuple(kind == "sliding_attention" for kind in types),
    }


def fields_of(config: ModelConfig, names) -> dict:
    return {name: getattr(config, name) for name in names}


def assert_alike(config: ModelConfig, fields: dict) -> None:
    assert fields_of(config, fields) == fields, "wrong as read, or a case for expected() or ROTATING above"


@pytest.mark.parametrize("architecture", CLASSES)
def test_a_file_of_nothing_but_the_type_is_the_class_built_with_no_argument(tmp_path, architecture):
    config_class = CLASSES[architecture]
    fields = expected(architecture, config_class())
    config = ours(tmp_path, {"model_type": config_class.model_type})
    assert_alike(config, fields)
    # The rest are what a class without RoPE or windows leaves as it is.
    others = {field.name for field in dataclasses.fields(ModelConfig)} - fields.keys()
    assert others <= {
        "ropes", "sliding_window", "sliding_layers", "quantization", "warnings", "attention_scale",
        "attention_softcap", "logit_softcap", "embedding_multiplier", "residual_multiplier", "logit_divisor",
        "attention_out_bias",
    }  # fmt: skip
    others.discard("warnings")
    assert all(
        getattr(config, field.name) == field.default for field in dataclasses.fields(config) if field.name in others
    )
    left_out = [key for key in SIZES if ARCHITECTURES[architecture].defaults.get(key) is not None]
    assert [warning.partition(": ")[2] for warning in config.warnings] == [
        f"{key} is missing, which makes it {ARCHITECTURES[architecture].defaults[key]}" for key in left_out
    ]


@pytest.mark.parametrize("architecture", CLASSES)
def test_the_table_has_every_key_of_the_class_with_its_default(architecture):
    config_class, table = CLASSES[architecture], dict(ARCHITECTURES[architecture].defaults)
    if architecture == "Gemma3ForCausalLM":
        bases = {"global": table.pop("rope_theta"), "local": table.pop("rope_local_base_freq")}
        assert bases == config_class.default_theta
    elif architecture != "BloomForCausalLM":
        assert table.pop("rope_theta") == config_class.default_theta
    if "Gemma" in architecture:
        types = config_class().layer_types
        assert types.index("full_attention") == table.pop("sliding_window_pattern") - 1
    if architecture == "MistralForCausalLM":
        # AutoConfig reads a Mistral with this key as Ministral.
        assert table.pop("layer_types") == transformers.MinistralConfig.layer_types
    inherited = {field.name for field in dataclasses.fields(transformers.PretrainedConfig)}
    own = {field.name: field.default for field in dataclasses.fields(config_class) if field.name not in inherited}
    if "head_dim" not in own and "head_dim" in table:
        assert table.pop("head_dim") is None  # read by the model alone
    if architecture == "Phi3ForCausalLM":
        assert table.pop("partial_rotary_factor") == config_class().rope_parameters["partial_rotary_factor"]
    assert table == {name: default for name, default in own.items() if name not in {*UNUSED, *FIXED_KEYS}}


@pytest.mark.parametrize(("architecture", "key"), KEYS)
def test_a_key_that_is_left_out_has_the_classs_default(tmp_path, architecture, key):
    values = small(architecture)
    del values[key]
    assert ours(tmp_path, {**values, "architectures": [architecture]}) == ours(tmp_path, values)
    assert_alike(ours(tmp_path, values), expected(architecture, theirs(architecture, values)))


@pytest.mark.parametrize(("architecture", "key"), KEYS)
def test_a_null_means_what_it_means_to_transformers_or_is_refused(tmp_path, architecture, key):
    values = {**small(architecture), key: None}
    if meaning := NULLS_OF_OUR_OWN.get((architecture, key)):
        assert fields_of(ours(tmp_path, values), meaning) == meaning
        return
    try:
        config = theirs(architecture, values)
    except REFUSALS:
        fields = None
    else:
        fields = expected(architecture, config)
    if fields is None or any(rope.theta is None for rope in fields.get("ropes", ())):
        with pytest.raises(ModelError, match=f"{key} is null; .*needed"):
            ours(tmp_path, values)
    else:
        assert_alike(ours(tmp_path, values), fields)


@pytest.mark.parametrize("architecture", CLASSES)
def test_the_type_alone_gives_transformers_causal_language_model(tmp_path, architecture):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": CLASSES[architecture].model_type}))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    theirs = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__
    assert theirs == ("LlamaForCausalLM" if type(config).model_type in SAVED_AS_LLAMA else architecture)
    assert ModelConfig.from_directory(tmp_path).architecture == architecture


@pytest.mark.parametrize(
    "names",
    [
        {"n_embed": 64, "hidden_size": 32},
        {"n_embed": None, "hidden_size": 32},
        {"num_attention_heads": 4, "n_head": 2},
        {"num_hidden_layers": 5, "n_layer": 3},
    ],
)
def test_of_blooms_two_names_the_same_wins(tmp_path, names):
    values = {"model_type": "bloom", **names}
    assert_alike(ours(tmp_path, values), expected("BloomForCausalLM", theirs("BloomForCausalLM", values)))
