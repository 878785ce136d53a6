# SPDX-License-Identifier: Apache-2.0
"""ModelConfig: both spellings of Hugging Face's files, the defaults, and each way in which they can be wrong."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from lightllm_backend.models.model_config import ModelConfig, ModelError
from lightllm_backend.models.rope import Rope

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True}
BLOOM = {
    "architectures": ["BloomForCausalLM"],
    "vocab_size": 250880,
    "hidden_size": 1024,
    "n_layer": 24,
    "n_head": 16,
    "layer_norm_epsilon": 1e-5,
}


def write(directory, generation=None, base=LLAMA, **changes):
    values = {key: value for key, value in {**base, **changes}.items() if value != "absent"}
    (directory / "config.json").write_text(json.dumps(values))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


def test_first_llama_needs_no_more_than_its_shape(tmp_path):
    assert ModelConfig.from_directory(write(tmp_path)) == ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        norm_eps=1e-6,
        ropes=(Rope(128),) * 32,
        attention_bias=False,
        mlp_bias=False,
        tie_word_embeddings=False,
        max_sequence_length=2048,
        torch_dtype=None,
        bos_id=1,
        eos_ids=(2,),
    )


def test_what_is_said_is_taken(tmp_path):
    config = ModelConfig.from_directory(
        write(
            tmp_path,
            num_key_value_heads=8,
            head_dim=64,
            rope_theta=500000,
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=True,
            bos_token_id=1,
        )
    )
    assert (config.num_kv_heads, config.head_dim, config.ropes[0], config.bos_id) == (8, 64, Rope(64, 500000.0), 1)
    assert config.attention_bias
    assert config.mlp_bias
    assert config.tie_word_embeddings


@pytest.mark.parametrize(
    ("written", "rope"),
    [
        ({"rope_scaling": None}, Rope(128)),
        ({"rope_scaling": {"type": "linear", "factor": 4}}, Rope(128, 1e4, "linear", 4.0)),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, Rope(128, 1e4, "dynamic", 2.0, 2048)),
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3}}, Rope(128, 1e4, "llama3", 8.0, 8192)),
        ({"rope_parameters": {"rope_type": "default"}}, Rope(128)),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4.0}}, Rope(128, 1e4, "linear", 4.0)),
        ({"rope_parameters": {"rope_type": "llama3", **LLAMA3}}, Rope(128, 1e4, "llama3", 8.0, 8192)),
    ],
)
def test_rope_scaling_in_both_spellings(tmp_path, written, rope):
    assert ModelConfig.from_directory(write(tmp_path, **written)).ropes == (rope,) * 32


def test_rope_theta_within_rope_parameters(tmp_path):
    write(tmp_path, rope_parameters={"rope_theta": 5e5, "rope_type": "default"})
    assert ModelConfig.from_directory(tmp_path).ropes == (Rope(128, 5e5),) * 32


def test_llama3_without_its_original_length_takes_the_models(tmp_path):
    without = {key: value for key, value in LLAMA3.items() if key != "original_max_position_embeddings"}
    write(tmp_path, rope_scaling={"rope_type": "llama3", **without})
    assert ModelConfig.from_directory(tmp_path).ropes[0].original_max_positions == 2048


@pytest.mark.parametrize(
    ("scaling", "length"),
    [
        (None, 2048),
        ({"type": "linear", "factor": 4.0}, 8192),
        ({"type": "dynamic", "factor": 2.5}, 5120),
        ({"type": "yarn", "factor": 4.0}, 8192),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}, 4096),
        ({"type": "longrope", "factor": 4.0, "short_factor": [1.0] * 64, "long_factor": [2.0] * 64}, 2048),
        ({"rope_type": "llama3", **LLAMA3}, 2048),
    ],
)
def test_scaling_lengthens_what_is_served(tmp_path, scaling, length):
    assert ModelConfig.from_directory(write(tmp_path, rope_scaling=scaling)).max_sequence_length == length


@pytest.mark.parametrize(
    ("written", "dtype"),
    [
        ({"torch_dtype": "float16"}, "float16"),
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "torch.half"}, "float16"),
        ({"dtype": "float32", "torch_dtype": "float16"}, "float32"),
        ({"dtype": None, "torch_dtype": "float16"}, "float16"),
        ({"torch_dtype": "float"}, "float32"),
        ({"torch_dtype": "float64"}, "float32"),
        ({"torch_dtype": "double"}, "float32"),
        ({"torch_dtype": None}, None),
    ],
)
def test_dtype_in_both_spellings(tmp_path, written, dtype):
    assert ModelConfig.from_directory(write(tmp_path, **written)).torch_dtype == dtype


@pytest.mark.parametrize(
    ("config", "generation", "eos_ids"),
    [
        (2, None, (2,)),
        ([3, 2], {}, (3, 2)),
        (2, {"eos_token_id": [5, 2, 1]}, (2, 5, 1)),
        (None, {"eos_token_id": 7}, (7,)),
        (None, {}, ()),
        # The class's default is for files that name none: 2 may be an ordinary token of this model.
        ("absent", {"eos_token_id": [7, 8]}, (7, 8)),
        ("absent", {}, (2,)),
        ("absent", None, (2,)),
    ],
)
def test_eos_ids_are_those_of_both_files(tmp_path, config, generation, eos_ids):
    assert ModelConfig.from_directory(write(tmp_path, generation, eos_token_id=config)).eos_ids == eos_ids


def test_bloom_needs_none_of_llamas_fields(tmp_path):
    assert ModelConfig.from_directory(write(tmp_path, base=BLOOM)) == ModelConfig(
        architecture="BloomForCausalLM",
        vocab_size=250880,
        hidden_size=1024,
        intermediate_size=4096,
        num_layers=24,
        num_heads=16,
        num_kv_heads=16,
        head_dim=64,
        norm_eps=1e-5,
        tie_word_embeddings=True,
        max_sequence_length=2**17,
        torch_dtype=None,
        bos_id=1,
        eos_ids=(2,),
        attention_bias=True,
        mlp_bias=True,
    )


def test_bloom_by_its_other_names(tmp_path):
    absent = dict.fromkeys(("hidden_size", "n_layer", "n_head"), "absent")
    write(
        tmp_path, base=BLOOM, **absent, n_embed=14336, num_hidden_layers=70, num_attention_heads=112, seq_length=2048,
        tie_word_embeddings=False,
    )  # fmt: skip
    config = ModelConfig.from_directory(tmp_path)
    assert (config.hidden_size, config.intermediate_size, config.num_layers) == (14336, 57344, 70)
    assert (config.num_heads, config.head_dim, config.max_sequence_length) == (112, 128, 2048)
    assert not config.tie_word_embeddings


SOME_LAYERS = ["sliding_attention", "full_attention", "full_attention"]


@pytest.mark.parametrize(
    ("architecture", "written", "windows"),
    [
        ("LlamaForCausalLM", {"sliding_window": 8}, (0, 0, 0)),
        ("MistralForCausalLM", {}, (4096, 4096, 4096)),
        ("MistralForCausalLM", {"sliding_window": None}, (0, 0, 0)),
        ("MistralForCausalLM", {"max_position_embeddings": 4097}, (4096, 4096, 4096)),
        ("MistralForCausalLM", {"max_position_embeddings": 4096}, (0, 0, 0)),
        ("MistralForCausalLM", {"sliding_window": 8, "use_sliding_window": False}, (8, 8, 8)),
        ("MistralForCausalLM", {"sliding_window": 8, "max_window_layers": 2}, (8, 8, 8)),
        ("MistralForCausalLM", {"sliding_window": 8, "layer_types": SOME_LAYERS}, (8, 0, 0)),
        ("Qwen2ForCausalLM", {}, (0, 0, 0)),
        ("Qwen2ForCausalLM", {"sliding_window": 8}, (0, 0, 0)),
        ("Qwen2ForCausalLM", {"sliding_window": 8, "use_sliding_window": True}, (0, 0, 0)),
        ("Qwen2ForCausalLM", {"use_sliding_window": True, "max_window_layers": 0}, (4096, 4096, 4096)),
        ("Qwen2ForCausalLM", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2}, (0, 0, 8)),
        ("Qwen2ForCausalLM", {"sliding_window": None, "use_sliding_window": True, "max_window_layers": 0}, (0, 0, 0)),
        ("Qwen2ForCausalLM", {"sliding_window": 8, "use_sliding_window": True, "layer_types": SOME_LAYERS}, (8, 0, 0)),
    ],
)
def test_the_window_of_each_layer(tmp_path, architecture, written, windows):
    shape = {"max_position_embeddings": 8192, "num_hidden_layers": 3, "architectures": [architecture]}
    write(tmp_path, **{**shape, **written})
    config = ModelConfig.from_directory(tmp_path)
    assert tuple(config.window(layer) for layer in range(3)) == windows


@pytest.mark.parametrize(
    ("window", "types", "needed"),
    [
        (8, None, None),
        (8, ["sliding_attention"] * 3, None),
        (8, SOME_LAYERS, "sliding_attention"),
        (8, ["full_attention"] * 3, "sliding_attention"),
        (8, ["sliding_attention"] * 2, "sliding_attention"),
        (None, None, None),
        (None, ["full_attention"] * 3, None),
        (None, SOME_LAYERS, "full_attention"),
        (None, "full_attention", "full_attention"),
    ],
)
def test_phi3_has_its_window_in_all_layers_or_in_none(tmp_path, window, types, needed):
    shape = {"architectures": ["Phi3ForCausalLM"], "max_position_embeddings": 4096, "num_hidden_layers": 3}
    write(tmp_path, **shape, sliding_window=window, layer_types=types)
    if needed is None:
        assert ModelConfig.from_directory(tmp_path).window(0) == (window or 0)
        return
    with pytest.raises(ModelError, match=f"layer_types is .*; {needed} is needed for each of 3 layers, as sliding_win"):
        ModelConfig.from_directory(tmp_path)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Olmo2ForCausalLM", "SeedOssForCausalLM"])
@pytest.mark.parametrize(
    ("written", "warned_of"),
    [
        ({}, []),
        ({"layer_types": None}, []),
        ({"layer_types": ["full_attention"] * 3}, []),
        ({"layer_types": SOME_LAYERS}, ["layer_types"]),
        ({"layer_types": "sliding_attention"}, ["layer_types"]),
        ({"sliding_window": 8}, ["sliding_window"]),
        ({"sliding_window": 8, "layer_types": SOME_LAYERS}, ["sliding_window", "layer_types"]),
    ],
)
def test_windows_of_a_class_without_them_are_warned_of(tmp_path, architecture, written, warned_of):
    write(tmp_path, architectures=[architecture], num_hidden_layers=3, **written)
    warnings = [line for line in ModelConfig.from_directory(tmp_path).warnings if " is not read" in line]
    said = "is not read: the class has none, so all tokens are seen"
    assert warnings == [f"{tmp_path / 'config.json'}: {key} {said}" for key in warned_of]


@pytest.mark.parametrize(
    ("named", "architecture"),
    [
        ({"architectures": ["LLaMAForCausalLM"], "model_type": "llama"}, "LlamaForCausalLM"),
        ({"architectures": ["LLaMAForCausalLM"]}, "LlamaForCausalLM"),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "Yi"}, "LlamaForCausalLM"),
        ({"architectures": None, "model_type": "llama"}, "LlamaForCausalLM"),
        ({"architectures": [], "model_type": "mistral"}, "MistralForCausalLM"),
        ({"architectures": "absent", "model_type": "qwen2"}, "Qwen2ForCausalLM"),
        ({"architectures": "absent", "model_type": "bloom"}, "BloomForCausalLM"),
        ({"architectures": ["InternLM3ForCausalLM"], "model_type": "internlm3"}, "InternLM3ForCausalLM"),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "internlm3"}, "InternLM3ForCausalLM"),
    ],
)
def test_the_class_is_named_by_architectures_or_else_by_model_type(tmp_path, named, architecture):
    assert ModelConfig.from_directory(write(tmp_path, **named)).architecture == architecture


def test_of_a_model_with_images_the_text_part_is_read(tmp_path):
    text = {"hidden_size": 64, "num_hidden_layers": 6, "sliding_window": 8, "eos_token_id": 1, "dtype": "float16"}
    whole = {"architectures": ["Gemma3ForConditionalGeneration"], "hidden_size": 7, "eos_token_id": [1, 106]}
    values = {**whole, "torch_dtype": "bfloat16", "dtype": "bfloat16", "text_config": text, "vision_config": {"a": 1}}
    config = ModelConfig.from_directory(write(tmp_path, base=values))
    assert (config.hidden_size, config.num_layers, config.sliding_window) == (64, 6, 8)
    assert config.sliding_layers == (True,) * 5 + (False,)
    assert (config.torch_dtype, config.eos_ids) == ("bfloat16", (1, 106))
    for changes, message in (
        ({"hidden_activation": "relu"}, "text_config.hidden_activation is 'relu'; 'gelu_pytorch_tanh' is needed"),
        ({"attn_logit_softcapping": 50.0}, "text_config.attn_logit_softcapping is 50.0; null is needed"),
    ):
        with pytest.raises(ModelError, match=message):
            ModelConfig.from_directory(write(tmp_path, base=values, text_config=text | changes))


@pytest.mark.parametrize(("architecture", "expected"), [("MistralForCausalLM", False), ("LlamaForCausalLM", True)])
def test_a_key_that_a_class_does_not_know_is_not_read(tmp_path, architecture, expected):
    write(tmp_path, architectures=[architecture], mlp_bias=True, attention_bias=True)
    config = ModelConfig.from_directory(tmp_path)
    assert (config.mlp_bias, config.attention_bias) == (expected, expected)


def test_a_default_that_does_not_fit_is_said_to_be_one(tmp_path):
    write(tmp_path, architectures=["MistralForCausalLM"], num_attention_heads=4)
    with pytest.raises(ModelError, match="num_key_value_heads is missing, which makes it 8; a divisor of .*, 4, is"):
        ModelConfig.from_directory(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_head": 12}, "hidden_size is 1024; a multiple of n_head, 12, is needed"),
        ({"n_embed": 1000}, "n_embed is 1000; a multiple of n_head, 16, is needed"),
        ({"n_layer": 0}, "n_layer is 0; an integer of at least 1 is needed"),
        ({"seq_length": "long"}, "seq_length is 'long'; an integer of at least 2"),
        ({"layer_norm_epsilon": 0}, "layer_norm_epsilon is 0; a number above 0"),
        (
            {"apply_residual_connection_post_layernorm": True},
            "apply_residual_connection_post_layernorm is True; false is needed",
        ),
        (
            {"quantization_config": {"bits": 8}},
            "quantization_config.quant_method is missing; methods that load: awq, gptq",
        ),
    ],
)
def test_an_impossible_value_of_bloom_is_named(tmp_path, changes, message):
    with pytest.raises(ModelError, match=rf"{tmp_path}/config\.json: .*{message}"):
        ModelConfig.from_directory(write(tmp_path, base=BLOOM, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": "many"}, "vocab_size is 'many'; an integer of at least 1 is needed"),
        ({"hidden_size": 0}, "hidden_size is 0; an integer of at least 1"),
        ({"vocab_size": 2**31}, "vocab_size is 2147483648; an integer of at most 2147483647 is needed"),
        ({"num_hidden_layers": 10_001}, "num_hidden_layers is 10001; an integer of at most 10000 is needed"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps is 10+; a smaller number is needed"),
        ({"hidden_size": 4097}, "hidden_size is 4097; a multiple of num_attention_heads, 32"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True; an integer"),
        ({"num_key_value_heads": 5}, "num_key_value_heads is 5; a divisor of num_attention_heads, 32"),
        ({"head_dim": 63}, "head_dim is 63; rotary embeddings need an even head_dim"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0; a number above 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; a number above 0"),
        ({"attention_bias": "yes"}, "attention_bias is 'yes'; true or false is needed"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'; a token id or a list"),
        ({"eos_token_id": [2, -1]}, r"eos_token_id is \[2, -1\]; a token id or a list"),
        ({"torch_dtype": 16}, "torch_dtype is 16; allowed: bfloat16, float16, half, float32"),
        ({"torch_dtype": "bfloat17"}, "torch_dtype is 'bfloat17'; allowed: bfloat16, "),
        ({"torch_dtype": "int8"}, "torch_dtype is 'int8'; allowed: bfloat16, "),
        ({"dtype": "auto"}, "dtype is 'auto'; allowed: bfloat16, "),
        ({"dtype": "float8_e4m3fn"}, "dtype is 'float8_e4m3fn'; allowed: bfloat16, "),
        ({"architectures": []}, r"architectures is \[\]; a list with the name"),
        ({"architectures": "absent"}, "architectures is missing; a list with the name"),
        (
            {"architectures": "absent", "model_type": "gpt2"},
            "is 'gpt2'; known .*: bloom, .*llama, ",
        ),
        (
            {"model_type": "mistral"},
            r"model_type is 'mistral'; architectures is \['LlamaForCausalLM'\]; both must name",
        ),
        ({"model_type": ["llama"]}, r"model_type is \['llama'\]; the name of a type is needed"),
        ({"hidden_size": None}, "hidden_size is null; an integer of at least 1"),
        ({"architectures": ["GPT2LMHeadModel"]}, "'GPT2LMHeadModel' is not known; known: .*LlamaForCausalLM"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; 'silu' is needed"),
        ({"rope_interleaved": True}, "rope_interleaved is True; false is needed"),
        ({"architectures": ["InternLM3ForCausalLM"], "qkv_bias": True}, "bias is missing; true is needed, as qkv_bias"),
        (
            {"architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": [1]},
            r"no_rope_layers is \[1\]; 1, or 0 for a layer without rotary embeddings, is needed for each of 32 layers",
        ),
        ({"is_causal": False}, "is_causal is False; true is needed"),
        ({"is_causal": None}, "is_causal is null; true is needed"),
        ({"per_layer_config": {"0": {"head_dim": 8}}}, "per_layer_config is {.*; null is needed"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder is True; false is needed"),
        ({"attention_chunk_size": 64}, "attention_chunk_size is 64; null is needed"),
        ({"kv_sharing_modes": ["reuse"]}, r"kv_sharing_modes is \['reuse'\]; null is needed"),
        (
            {"architectures": ["MixtralForCausalLM"], "num_local_experts": 8},
            "mixtures of experts are not served: the architecture 'MixtralForCausalLM' is not known",
        ),
        (
            {"architectures": ["Qwen3NextForCausalLM"], "layer_types": ["linear_attention", "full_attention"]},
            "models with linear attention or a state space are not served: the architecture 'Qwen3NextForCausalLM'",
        ),
        (
            {"architectures": ["LlavaForConditionalGeneration"], "vision_config": {"a": 1}},
            "models with images, sound or video are not served: the architecture 'LlavaForConditionalGeneration'",
        ),
        (
            {"architectures": ["Phi3VForCausalLM"], "img_processor": {"name": "clip_vision_model"}},
            "models with images, sound or video are not served: the architecture 'Phi3VForCausalLM' is not known",
        ),
        (
            {"architectures": ["Phi4MMForCausalLM"], "embd_layer": {"a": 1}, "img_processor": None},
            "models with images, sound or video are not served: the architecture 'Phi4MMForCausalLM' is not known",
        ),
        (
            {"architectures": ["Gemma3nForConditionalGeneration"], "audio_soft_tokens_per_image": 188},
            "models with images, sound or video are not served: the architecture 'Gemma3nForConditionalGeneration'",
        ),
        (
            {"architectures": None, "model_type": "mixtral", "num_local_experts": 8},
            "model_type is 'mixtral'; mixtures of experts are not served; known without architectures",
        ),
        (
            {**QWEN2, "use_sliding_window": False, "layer_types": ["sliding_attention"] * 32},
            "use_sliding_window is False; true is needed for the sliding_attention in layer_types",
        ),
        (
            {**QWEN2, "sliding_window": None, "layer_types": ["sliding_attention"] * 32},
            "sliding_window is null; a window is needed for the sliding_attention in layer_types",
        ),
        ({**QWEN2, "sliding_window": 0}, "sliding_window is 0; an integer of at least 1"),
        ({**QWEN2, "max_window_layers": -1}, "max_window_layers is -1; an integer of at least 0"),
        ({**QWEN2, "max_window_layers": None}, "max_window_layers is null; an integer of at least 0"),
        ({**QWEN2, "layer_types": ["full_attention"]}, "layer_types is .*; one of full_attention .* each of 32 layers"),
        (
            {**QWEN2, "use_sliding_window": False, "layer_types": ["linear_attention"] * 32},
            "layer_types is .*; one of full_attention .* each of 32 layers",
        ),
        ({**QWEN2, "max_position_embeddings": 1}, "max_position_embeddings is 1; an integer of at least 2 is needed"),
        ({**QWEN2, "layer_types": ["chunked_attention"] * 32}, "layer_types is .*; one of full_attention | sliding"),
        (
            {"partial_rotary_factor": 0.5, "rope_scaling": {"type": "linear", "factor": 2}},
            "partial_rotary_factor is 0.5; 1 is needed",
        ),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5; a number of at most 1"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'; an object is needed"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling.factor is missing; a number above 0"),
        ({"rope_scaling": {"type": "su"}}, "rope_scaling.type is 'su'; known: default, linear, dynamic, llama3, yarn"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing; a number above 0"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}, "head_dim": 2}, "type is 'dynamic'; more than 2 dim"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "rope_scaling.factor is 0.5; a number of at least 1"),
        (
            {"rope_scaling": {"type": "linear", "factor": 1e99}},
            "rope_scaling.factor is 1e\\+99; a number of at most 65536",
        ),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8}}, "rope_parameters.low_freq_factor is missing"),
        (
            {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "low_freq_factor": 4.0}},
            "rope_scaling.low_freq_factor is 4.0; a number below high_freq_factor, 4.0",
        ),
    ],
)
def test_an_impossible_value_is_named(tmp_path, changes, message):
    with pytest.raises(ModelError, match=rf"{tmp_path}/config\.json: .*{message}"):
        ModelConfig.from_directory(write(tmp_path, **changes))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[" * 99_999, "is nested too deeply"),
        ("[]", "holds an array; a JSON object"),
        ("\xff", "not valid JSON"),
    ],
    ids=["cut", "nested", "list", "no UTF-8"],
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_bad_json_is_an_error(tmp_path, name, text, message):
    write(tmp_path)
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError, match=rf"/{name}: .*{message}"):
        ModelConfig.from_directory(tmp_path)


def test_a_missing_directory_and_a_missing_file_are_errors(tmp_path):
    with pytest.raises(ModelError, match="nowhere: there is no such directory; a Hugging Face model directory"):
        ModelConfig.from_directory(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"config\.json: there is no such file"):
        ModelConfig.from_directory(tmp_path)


def test_a_model_error_is_a_value_error():
    assert issubclass(ModelError, ValueError)


def test_the_configuration_is_read_without_torch(tmp_path):
    code = (
        "import sys; from lightllm_backend.models.model_config import ModelConfig; "
        f"ModelConfig.from_directory({str(write(tmp_path))!r}); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
