# SPDX-License-Identifier: Apache-2.0
"""What the configurations of quantised checkpoints say of each layer, and what is refused."""

from __future__ import annotations

import importlib
import json
import re

import pytest

from lightllm_backend.models.errors import ModelError
from lightllm_backend.models.model_config import ModelConfig
from lightllm_backend.models.quantization.config import METHODS
from lightllm_backend.models.quantization.scheme import Activations, Granularity, Kind, Storage

LLAMA = {"architectures": ["LlamaForCausalLM"]}
UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.11.mlp.down_proj"
INT4 = {"num_bits": 4, "strategy": "group", "group_size": 128}
INT8 = {"num_bits": 8, "strategy": "channel"}
UB = "quantization_config.activation_scale_ub"
AWQ, GPTQ, FP8, FBGEMM = ({"quant_method": name} for name in ("awq", "gptq", "fp8", "fbgemm_fp8"))


def quantization(directory, config=None, **files):
    values = LLAMA if config is None else LLAMA | {"quantization_config": config}
    for name, content in {"config": values, **files}.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return ModelConfig.from_directory(directory).quantization


def group(weights, *targets, **more):
    return {"targets": list(targets or ("Linear",)), "weights": weights, **more}


def compressed(*groups, stored="pack-quantized", **more):
    named = {f"group_{number}": value for number, value in enumerate(groups)}
    return {"quant_method": "compressed-tensors", "format": stored, "config_groups": named, **more}


def test_without_a_word_nothing_is_quantised(tmp_path):
    assert quantization(tmp_path).scheme(UP) is None
    assert quantization(tmp_path, quantize_config={"bits": 4}).method == "gptq"


def test_config_json_counts_before_the_file_beside_it(tmp_path):
    found = quantization(tmp_path, {"quant_method": "gptq", "bits": 8}, quantize_config={"bits": 4})
    assert found.scheme(UP).kind is Kind.INT8


def test_configurations_as_the_tools_write_them(tmp_path):
    """With nulls for what they do not use, and keys that matter to them alone."""
    gptq = {
        "batch_size": 1, "bits": 4, "checkpoint_format": None, "desc_act": False, "exllama_config": {"version": 1},
        "group_size": 128, "modules_in_block_to_quantize": None, "quant_method": "gptq", "sym": True, "dynamic": None,
    }  # fmt: skip
    scheme = quantization(tmp_path, gptq).scheme(UP)
    assert (scheme.storage, scheme.kind, scheme.group_size) == (Storage.GPTQ, Kind.INT4, 128)
    unused = {"actorder": None, "block_structure": None, "group_size": None, "observer": None, "observer_kwargs": {}}
    weights = {**unused, "num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
    inputs = {**unused, "num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True}
    dense = {"format": "dense", "global_sparsity": 0.14, "ignore": [], "registry_requires_subclass": False}
    more = {"kv_cache_scheme": None, "global_compression_ratio": 1.5, "quantization_status": "compressed"}
    config = compressed(
        group(weights, input_activations=inputs, output_activations=None), stored="float-quantized",
        ignore=["lm_head"], sparsity_config=dense, transform_config={}, **more,
    )  # fmt: skip
    scheme = quantization(tmp_path, config).scheme(UP)
    assert (scheme.kind, scheme.granularity, scheme.activations) == (Kind.FP8, Granularity.CHANNEL, Activations.DYNAMIC)


def test_layers_that_are_left_out(tmp_path):
    """A pattern stands for whole parts of a name, so that a router called gate is not a gate_proj."""
    awq = {"quant_method": "awq", "modules_to_not_convert": ["layers.1", "mlp.down", "self_attn.q_proj", "gate"]}
    found = quantization(tmp_path, awq)
    names = (UP, DOWN, "lm_head", "model.layers.1.mlp.up_proj", "model.layers.0.self_attn.q_proj")
    assert [found.scheme(name) is None for name in names] == [False, False, True, True, True]
    assert found.scheme("model.layers.0.mlp.gate_proj") is not None
    exclude = {"quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head", "model.layers.1*", "*up_proj"]}}
    found = quantization(tmp_path, hf_quant_config=exclude)
    names = ("lm_head", DOWN, UP, "model.layers.0.mlp.down_proj")
    assert [found.scheme(name) is None for name in names] == [True, True, True, False]


def test_the_exceptions_of_gptqmodel(tmp_path):
    dynamic = {"-:.*down_proj": {}, r"+:.*\.0\..*": {"bits": 8, "group_size": -1, "sym": False, "desc_act": True}}
    found = quantization(tmp_path, {"quant_method": "gptq", "dynamic": dynamic, "lm_head": True})
    assert found.scheme(DOWN) is None
    own = found.scheme(UP)
    assert (own.kind, own.group_size, own.has_zeros, own.has_order) == (Kind.INT8, 0, True, True)
    other = found.scheme("model.layers.1.mlp.up_proj")
    assert (other.kind, other.group_size, other.has_zeros, other.has_order) == (Kind.INT4, 128, False, False)
    assert found.scheme("lm_head") == other
    inside = {"quant_method": "gptq", "modules_in_block_to_quantize": [["self_attn.q_proj"], ["mlp.up_proj"]]}
    found = quantization(tmp_path, inside)
    assert (found.scheme(UP) is None, found.scheme(DOWN) is None, found.scheme("lm_head") is None) == (
        False,
        True,
        True,
    )


def auto_round(**more):
    return {"quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": True, **more}


def test_the_layouts_of_auto_round(tmp_path):
    """An older name of each, too; the text without one is GPTQ's."""
    stored = {
        "auto_round:auto_gptq": Storage.GPTQ, "auto_round:gptq": Storage.GPTQ,
        "auto_round:auto_awq": Storage.AWQ, "auto_round:awq": Storage.AWQ,
        "auto_round": Storage.GPTQ_V2, "auto_round:gptqmodel": Storage.GPTQ_V2,
    }  # fmt: skip
    for packing, storage in stored.items():
        scheme = quantization(tmp_path, auto_round(packing_format=packing, sym=False)).scheme(UP)
        assert (scheme.storage, scheme.kind, scheme.has_zeros, scheme.has_order) == (storage, Kind.INT4, True, False)
    assert quantization(tmp_path, auto_round()).scheme(UP).storage is Storage.GPTQ


def test_the_exceptions_of_auto_round(tmp_path):
    """Names before regular expressions, which may match anywhere, before blocks."""
    exceptions = {
        r"layers\.0\.": {"bits": 8},
        UP: {"group_size": 64},
        "lm_head": {"bits": 8, "group_size": -1, "sym": None},
        r".*down_proj.*": {"bits": 16, "data_type": "float", "act_bits": 16},
    }
    found = quantization(tmp_path, auto_round(extra_config=exceptions))
    assert (found.scheme(UP).kind, found.scheme(UP).group_size) == (Kind.INT4, 64)
    assert (found.scheme("lm_head").kind, found.scheme("lm_head").group_size) == (Kind.INT8, 0)
    assert found.scheme(DOWN) is None
    assert found.scheme("model.layers.0.mlp.gate_proj").kind is Kind.INT8
    assert quantization(tmp_path, auto_round()).scheme("lm_head") is None


@pytest.mark.parametrize(
    "blocks",
    [
        {"block_name_to_quantize": "model.layers.1, model.vision"},
        {"block_name_to_quantize": ["model.layers.1"]},
        {"block_name_to_quantize": [["model.layers.1", "model.layers.2"]]},
        {"to_quant_block_names": "model.layers.1"},
    ],
)
def test_the_blocks_of_auto_round(tmp_path, blocks):
    """A block's name is whole parts of a layer's: layer 11 is not in block 1."""
    found = quantization(tmp_path, auto_round(**blocks))
    assert found.scheme("model.layers.1.mlp.up_proj").kind is Kind.INT4
    assert found.scheme(DOWN) is found.scheme(UP) is found.scheme("lm_head") is None


def test_the_methods_of_modelopt(tmp_path):
    """In the form of config.json, with what other tools read beside it."""
    weights = {"dynamic": False, "num_bits": 8, "type": "float"}
    config = {
        "quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN", "ignore": ["lm_head"],
        "config_groups": {"group_0": {"weights": weights, "targets": ["Linear"]}}, "producer": {"name": "modelopt"},
    }  # fmt: skip
    scheme = quantization(tmp_path, config).scheme(UP)
    assert (scheme.granularity, scheme.activations) == (Granularity.CHANNEL, Activations.DYNAMIC)
    scheme = quantization(tmp_path, config | {"quant_algo": "FP8_PB_WO"}).scheme(UP)
    assert (scheme.granularity, scheme.activations) == (Granularity.BLOCK, Activations.AS_THEY_ARE)
    layers = {UP: {"quant_algo": "W8A16"}}
    found = quantization(tmp_path, config | {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers})
    assert (found.scheme(UP).kind, found.scheme(DOWN), found.scheme("lm_head")) == (Kind.INT8, None, None)


def test_the_groups_of_compressed_tensors(tmp_path):
    """Names before regular expressions before classes, whatever the order of the groups; what is ignored, first."""
    found = quantization(
        tmp_path,
        compressed(
            group(INT4, format="pack-quantized"),
            group({**INT8, "type": "float"}, r"re:.*down_proj", format="float-quantized"),
            group(INT8, DOWN, format="int-quantized", input_activations={"num_bits": 8, "strategy": "tensor"}),
            stored="mixed-precision",
            ignore=["lm_head", "re:model.layers.2.*"],
        ),
    )
    assert found.scheme(UP).storage is Storage.PACKED
    assert (found.scheme(DOWN).kind, found.scheme(DOWN).activations) == (Kind.INT8, Activations.STATIC)
    assert found.scheme("model.layers.3.mlp.down_proj").kind is Kind.FP8
    assert found.scheme("lm_head") is found.scheme("model.layers.2.mlp.up_proj") is None


def test_the_forms_of_a_scheme(tmp_path):
    block = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}
    by_group = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 128, "dynamic": True}
    scheme = quantization(
        tmp_path, compressed(group(block, input_activations=by_group), stored="float-quantized")
    ).scheme(UP)
    assert (scheme.granularity, scheme.group_size, scheme.scale_name) == (Granularity.BLOCK, 128, "weight_scale")
    scheme = quantization(tmp_path, compressed(group({"num_bits": 4, "group_size": -1}))).scheme(UP)
    assert (scheme.granularity, scheme.group_size) == (Granularity.CHANNEL, 0)
    blocks = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    assert quantization(tmp_path, blocks).scheme(UP).scale_name == "weight_scale_inv"


def torchao(kind, granularity=None, version=2, **data):
    return {"_type": kind, "_version": version, "_data": data | {"granularity": granularity}}


def of_torchao(config, **more):
    return {"quant_method": "torchao", "quant_type": {"default": config}, **more}


def per(name, **data):
    return {"_type": f"Per{name}", "_version": 1, "_data": data}


FP8_DYNAMIC, INT8_WEIGHT = "Float8DynamicActivationFloat8WeightConfig", "Int8WeightOnlyConfig"


def test_the_granularities_of_torchao(tmp_path):
    """The second of two is that of the weights. Without one, fp8 with dynamic activations has a scale by tensor."""
    blocks = [per("Block", block_size=[1, 128]), per("Block", block_size=[128, 128])]
    for given, granularity, size in (
        (None, Granularity.TENSOR, 0),
        (per("Row", dim=-1), Granularity.CHANNEL, 0),
        ([per("Tensor"), per("Row")], Granularity.CHANNEL, 0),
        (blocks, Granularity.BLOCK, 128),
    ):
        scheme = quantization(tmp_path, of_torchao(torchao(FP8_DYNAMIC, given))).scheme(UP)
        assert (scheme.kind, scheme.activations) == (Kind.FP8, Activations.DYNAMIC)
        assert (scheme.granularity, scheme.group_size) == (granularity, size)
    scheme = quantization(tmp_path, of_torchao(torchao(INT8_WEIGHT))).scheme(UP)
    assert (scheme.kind, scheme.activations) == (Kind.INT8, Activations.AS_THEY_ARE)
    assert scheme.granularity is Granularity.CHANNEL


@pytest.mark.parametrize("names", ["fqn_to_config", "module_fqn_to_config"])
def test_the_layers_of_torchao(tmp_path, names):
    """Names before regular expressions, which match whole names, before the default."""
    by_name = {
        "_default": torchao(FP8_DYNAMIC, per("Row")),
        r"re:model\.layers\.1": None,
        "re:.*down_proj": None,
        "model.layers.3.mlp.down_proj.weight": torchao(INT8_WEIGHT),
    }
    kind = "FqnToConfig" if names == "fqn_to_config" else "ModuleFqnToConfig"
    config = {"_type": kind, "_version": 1, "_data": {names: by_name}}
    found = quantization(tmp_path, of_torchao(config, modules_to_not_convert=["lm_head", "model.layers.5"]))
    assert found.scheme("model.layers.3.mlp.down_proj").kind is Kind.INT8
    assert found.scheme("model.layers.1.mlp.up_proj").kind is Kind.FP8
    assert found.scheme(DOWN) is found.scheme("lm_head") is found.scheme("model.layers.5.mlp.up_proj") is None
    by_name[r"re:.*up_proj\.weight"] = None
    assert quantization(tmp_path, of_torchao(config)).scheme(UP) is None
    del by_name[r"re:.*up_proj\.weight"]
    del by_name["_default"]
    assert quantization(tmp_path, of_torchao(config)).scheme(UP) is None


@pytest.mark.parametrize(
    ("left_out", "of_modules", "of_weights"),
    [
        (UP, False, False),
        ("model.layers.0.mlp", False, False),
        (r"model\.layers\.[02]\.mlp", False, False),
        (".*up_proj", False, False),
        (".*mlp|.*attn", False, False),
        ("up_proj", False, True),
        ("_proj", False, True),
        ("", False, False),
        ("up_proj.weight", True, False),
        ("layers.0", True, True),
        ("mlp", True, True),
        ("model.layers.0.mlp.up", True, True),
        ("model.layers.0.mlp.up_proj.", True, False),
    ],
)
def test_layers_that_transformers_leaves_out(tmp_path, left_out, of_modules, of_weights):
    """transformers 5.23 compares a list with the names of modules, and of torchao's with those of weights."""
    should_convert_module = importlib.import_module("transformers.quantizers.quantizers_utils").should_convert_module
    assert should_convert_module(UP, [left_out]) == of_modules
    assert should_convert_module(f"{UP}.weight", [left_out]) == of_weights
    lists = {"modules_to_not_convert": [left_out]}
    for config in (FP8 | lists, FP8 | {"ignored_layers": [left_out]}, FBGEMM | lists):
        assert (quantization(tmp_path, config).scheme(UP) is not None) == of_modules
    found = quantization(tmp_path, of_torchao(torchao(INT8_WEIGHT), **lists))
    assert (found.scheme(UP) is not None) == of_weights


def test_modules_to_not_convert_counts_before_ignored_layers(tmp_path):
    """Both name fp8's list, and transformers reads the second where the first is null."""
    found = quantization(tmp_path, FP8 | {"ignored_layers": [UP], "modules_to_not_convert": [DOWN]})
    assert found.scheme(UP) is not None
    assert found.scheme(DOWN) is None


# As llm-compressor, GPTQModel, AutoRound and users of torchao write them.
EXPRESSIONS = [
    ".*lm_head", ".*mlp.gate$", ".*self_attn.*", r".*\.mlp\.(gate|up)_proj$", r"model[.]layers[.]\d+[.]mlp", r"\.0\.",
    r".*\.(?:[0-9]|1[0-1])\..*", r"model\.layers\.(?!(?:0|1)\.).*", r".*(?<!gate_)proj", "(?i).*UP_PROJ", "^model$",
    r"layers\.(?P<layer>\d+)\.", r"(.)\1", r"[^.]+\.layers\b", r"model\.layers\.\d{2,}\..*", r".*\.o_proj|.*up_proj",
]  # fmt: skip


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_regular_expressions_are_those_of_python(tmp_path, expression):
    parts = ("mlp.up_proj", "mlp.gate", "self_attn.o_proj")
    names = [f"model.layers.{number}.{part}" for number in (0, 1, 11) for part in parts]
    ignore = compressed(group(INT4), ignore=[f"re:{expression}"])
    by_name = {"_type": "FqnToConfig", "_data": {"fqn_to_config": {f"re:{expression}": torchao(INT8_WEIGHT)}}}
    for config, compare, chosen in (
        (ignore, re.match, False),
        (GPTQ | {"dynamic": {f"-:{expression}": {}}}, re.match, False),
        (auto_round(extra_config={expression: {"bits": 16}}), re.search, False),
        (of_torchao(by_name), re.fullmatch, True),
    ):
        found = quantization(tmp_path, config)
        for name in names:
            assert (found.scheme(name) is not None) == (bool(compare(expression, name)) == chosen), (config, name)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (compressed(group(INT4), ignore=["lm_head", "re:.*up"]), r"ignore: '\.\*up'"),
        (compressed(group(INT4, "re:.*up")), r"config_groups\.group_0\.targets: '\.\*up'"),
        ({"quant_method": "gptq", "dynamic": {"+:.*up": {}}}, r"dynamic\.\+:\.\*up: '\.\*up'"),
        (auto_round(extra_config={".*up": {}}), r"extra_config\.\.\*up: '\.\*up'"),
        ({"quant_method": "fp8", "modules_to_not_convert": [".*up"]}, r"modules_to_not_convert: '\.\*up'"),
        ({"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["*up"]}, r"ignore: '\*up'"),
        (
            of_torchao({"_type": "FqnToConfig", "_data": {"fqn_to_config": {"re:.*up": None}}}),
            r"fqn_to_config\.re:\.\*up: '\.\*up'",
        ),
    ],
)
def test_a_pattern_that_takes_too_long_is_refused(tmp_path, monkeypatch, config, message):
    """No time at all is less than any comparison takes."""
    found = quantization(tmp_path, config)
    found.scheme(UP)
    monkeypatch.setattr("lightllm_backend.models.quantization.scheme.MAX_MATCH_SECONDS", 0.0)
    message = rf"/config\.json: quantization_config\.(\S+\.)?{message} takes more than 0 s to compare with {UP}; a pat"
    with pytest.raises(ModelError, match=message):
        found.scheme(UP)


def test_the_bound_of_fbgemms_scales_is_said_to_be_ignored(tmp_path):
    """FBGEMM writes 1200 by default, so checkpoints with it must load."""
    for more, number in (({"activation_scale_ub": 1200.0}, 1), ({"activation_scale_ub": None}, 0), ({}, 0)):
        quantization(tmp_path, FBGEMM | more)
        warnings = [text for text in ModelConfig.from_directory(tmp_path).warnings if "_ub" in text]
        assert len(warnings) == number
        assert all(text.startswith(f"{tmp_path}/config.json: {UB} is 1200, but act") for text in warnings)


@pytest.mark.parametrize("stored", [None, "float", "float32", "ue8m0"])
def test_the_formats_of_fp8s_scales(tmp_path, stored):
    config = FP8 | {"weight_block_size": [128, 128], "scale_fmt": stored}
    assert quantization(tmp_path, config).scheme(UP).granularity is Granularity.BLOCK


def test_torchao_in_pickles(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(ModelError, match=r"quant_method is 'torchao'; \.safetensors files are .* pytorch_model\.bin"):
        quantization(tmp_path, of_torchao(torchao(INT8_WEIGHT)))


MIXED = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}
ALL = ", ".join(METHODS)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "bitsandbytes"}, f"quant_method is 'bitsandbytes'; methods that load: {ALL}"),
        ({"quant_method": ["awq"]}, r"quant_method is \['awq'\]; methods that load"),
        ({"load_in_4bit": True}, "quant_method is missing; methods that load"),
        (AWQ | {"bits": 3}, "bits is 3; allowed: 4"),
        (AWQ | {"version": "marlin"}, "version is 'marlin'; allowed: 'gemm'"),
        (AWQ | {"group_size": 100}, "group_size is 100; allowed: multiples of 8, and -1"),
        (AWQ | {"zero_point": "yes"}, "zero_point is 'yes'; true or false"),
        (AWQ | {"modules_to_not_convert": "lm_head"}, "modules_to_not_convert is 'lm_head'; a list of layers' names"),
        (AWQ | {"modules_to_not_convert": ["x" * 2000, 1]}, r"modules_to_not_convert is \['x{998}…; a list of layers'"),
        (GPTQ | {"bits": 3}, "bits is 3; allowed: 4, 8"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'; allowed: 'gptq', 'gptq_v2'"),
        (GPTQ | {"dynamic": {"-:(": {}}}, r"dynamic.-:\( is {}; '\(' is no regular expression"),
        (FP8 | {"weight_block_size": [64, 64]}, r"weight_block_size is \[64, 64\]; allowed: \[128, 128\]"),
        (FP8 | {"weight_scale_semantics": "inverse"}, "weight_scale_semantics is 'inverse'; null is needed"),
        (FP8 | {"scale_fmt": "ue4m3"}, "scale_fmt is 'ue4m3'; allowed: 'float', 'float32', 'ue8m0'"),
        (
            FP8 | {"modules_to_not_convert": ["(?i)up"]},
            r"modules_to_not_convert is .*; '\(\?:\(\?i\)up\)' is no regular",
        ),
        (FBGEMM | {"activation_scale_ub": "1200"}, "activation_scale_ub is '1200'; a number above 0 is needed"),
        (
            GPTQ | {"dynamic": {"-:(a{99}){99}": {}}},
            r"dynamic\.-:\(a.99.\).99. is {}; '\(a.99.\).99.' demands 9801 repetitions; at most 1000",
        ),
        (GPTQ | {"dynamic": {"-:a{" + "9" * 5000 + "}": {}}}, "dynamic.* is no regular expression"),
        (FP8 | {"activation_scheme": "token"}, "activation_scheme is 'token'; allowed: 'dynamic', 'static'"),
        (
            {"quant_method": "modelopt", "quant_algo": "NVFP4"},
            "quant_algo is 'NVFP4'; allowed: 'FP8', 'FP8_PER_CHANNEL_PER_TOKEN', .*'W8A16', 'MIXED_PRECISION'",
        ),
        (
            MIXED | {"quantized_layers": {UP: {"quant_algo": "W4A16_AWQ"}}},
            rf"quantized_layers\.{UP}\.quant_algo is 'W4A16_AWQ'; allowed: 'FP8', .* 'W8A16'$",
        ),
        (MIXED | {"quantized_layers": [UP]}, "quantized_layers is .*; an object is needed"),
        (auto_round(bits=3), "bits is 3; allowed: 4, 8, 16, 32"),
        (auto_round(bits=8, packing_format="auto_round:auto_awq"), "bits is 8; allowed: 4, 16, 32"),
        (auto_round(packing_format="auto_round:fp8_static"), "packing_format is 'auto_round:fp8_static'; allowed: 'au"),
        (auto_round(data_type="mx_fp"), "data_type is 'mx_fp'; allowed: 'int'"),
        (auto_round(act_bits=8), "act_bits is 8; allowed: 16, 32"),
        (auto_round(extra_config=[UP]), "extra_config is .*; an object is needed"),
        (auto_round(extra_config={UP: {"bits": 2}}), rf"extra_config\.{UP}\.bits is 2; allowed: 4, 8, 16, 32"),
        (auto_round(extra_config={"(": {}}), r"extra_config\.\( is {}; '\(' is no regular expression"),
        (auto_round(block_name_to_quantize=[1]), r"block_name_to_quantize is \[1\]; a list of layers' names"),
        (auto_round(rotation_config={"block_size": 32}), "rotation_config is .*; null is needed"),
        (compressed(group(INT4), stored="nvfp4-pack-quantized"), "format is 'nvfp4-pack-quantized'; allowed: 'pack-"),
        (compressed(), "config_groups is {}; at least one group"),
        (compressed(group({**INT4, "num_bits": 3})), "weights.num_bits is 3; allowed: 4, 8"),
        (
            compressed(group({**INT4, "strategy": "tensor"})),
            "weights.strategy is 'tensor'; allowed: 'channel', 'group'",
        ),
        (compressed(group(INT4, input_activations={"num_bits": 8})), "input_activations is .*; null is needed"),
        (compressed(group({**INT8, "symmetric": False}), stored="int-quantized"), "symmetric is False; true is needed"),
        (
            compressed(group(INT8, input_activations={"num_bits": 8, "symmetric": False}), stored="int-quantized"),
            "input_activations.symmetric is False; true is needed",
        ),
        (
            compressed(group(INT4), sparsity_config={"format": "sparse-24"}),
            "sparsity_config is .*; a format of 'dense'",
        ),
        (
            of_torchao(torchao("Int4WeightOnlyConfig")),
            "default._type is 'Int4WeightOnlyConfig'; allowed: 'Float8Weight",
        ),
        (of_torchao(torchao(INT8_WEIGHT, version=1)), "default._version is 1; allowed: 2"),
        (of_torchao(torchao(INT8_WEIGHT, group_size=32)), "_data.group_size is 32; null is needed"),
        (
            of_torchao(torchao(FP8_DYNAMIC, weight_dtype={"_type": "torch.dtype", "_data": "float8_e5m2"})),
            "weight_dtype._data is 'float8_e5m2'; allowed: 'float8_e4m3fn'",
        ),
        (of_torchao(torchao(FP8_DYNAMIC, per("Group", group_size=32))), "granularity._type is 'PerGroup'; allowed"),
        (
            of_torchao(torchao(FP8_DYNAMIC, [per("Row"), per("Block", block_size=[64, 64])])),
            r"granularity\.1\._data is .*; a block_size of \[128, 128\] is needed",
        ),
        (
            of_torchao(torchao(FP8_DYNAMIC, [per("Block", block_size=[128, 128])] * 2)),
            r"granularity\.0\._data is .*; a block_size of \[1, 128\] is needed",
        ),
        (of_torchao(torchao(FP8_DYNAMIC, per("Row", dim=0))), r"granularity\._data\.dim is 0; allowed: -1"),
        (of_torchao(torchao(FP8_DYNAMIC, [per("Row", dim=1)] * 2)), r"granularity\.0\._data\.dim is 1; allowed: -1"),
        (of_torchao(torchao(FP8_DYNAMIC, [per("Row"), {}])), r"granularity\.1\._type is missing; allowed: 'PerRow'"),
        (of_torchao(torchao(FP8_DYNAMIC, [None])), r"granularity is \[None\]; an object is needed, or two: the"),
        (of_torchao(torchao(FP8_DYNAMIC, [None, None])), r"granularity is \[None, None\]; an object is needed, or"),
        (of_torchao(torchao(INT8_WEIGHT, [per("Row")])), r"granularity is \[.*\]; an object is needed, or two: the"),
        (
            of_torchao(torchao(INT8_WEIGHT), include_input_output_embeddings=True),
            "include_input_output_embeddings is True; false is needed",
        ),
        ({"quant_method": "torchao", "quant_type": "int8_weight_only"}, "quant_type is 'int8.*; an object is needed"),
        (compressed(group(INT4, "re:(")), r"targets is \['re:\('\]; '\(' is no regular expression"),
    ],
)
def test_what_is_refused(tmp_path, config, message):
    with pytest.raises(ModelError, match=rf"config\.json: quantization_config\.(\S+\.)?{message}"):
        quantization(tmp_path, config)


def test_a_file_beside_config_json_is_named(tmp_path):
    with pytest.raises(
        ModelError, match=r"hf_quant_config\.json: quantization\.quant_algo is 'W4A8_AWQ'; allowed: 'FP8'"
    ):
        quantization(tmp_path, hf_quant_config={"quantization": {"quant_algo": "W4A8_AWQ"}})
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"compression_config": {"format": "x"}}))
    with pytest.raises(
        ModelError, match=r"config\.json: compression_config is .*; a quantization_config is needed, of"
    ):
        ModelConfig.from_directory(tmp_path)
