# SPDX-License-Identifier: Apache-2.0
"""Reads the quantization_config of torchao, as transformers writes it beside .safetensors files. Imports no torch.

A configuration is an object {"_type": its class, "_version": …, "_data": its fields}, and so are fields that are no
plain values.
"""

from __future__ import annotations

from dataclasses import replace

from lightllm_backend.models.config_fields import ConfigFields
from lightllm_backend.models.errors import ModelError
from lightllm_backend.models.find_weights import find_weight_files
from lightllm_backend.models.quantization.fields import BLOCK, checked_regex, given, head_left_out, left_out, one_of
from lightllm_backend.models.quantization.scheme import (
    Activations,
    Granularity,
    Kind,
    Match,
    Rule,
    Storage,
    WeightScheme,
)

# By class: the kind of the weights, the activations, and the granularity of a configuration that names none.
_CLASSES = {
    "Float8WeightOnlyConfig": (Kind.FP8, Activations.AS_THEY_ARE, "PerRow"),
    "Float8DynamicActivationFloat8WeightConfig": (Kind.FP8, Activations.DYNAMIC, "PerTensor"),
    "Int8WeightOnlyConfig": (Kind.INT8, Activations.AS_THEY_ARE, "PerRow"),
    "Int8DynamicActivationInt8WeightConfig": (Kind.INT8, Activations.DYNAMIC, "PerRow"),
}
# The classes that have a configuration for each layer, and the field that holds those.
_BY_NAME = {"FqnToConfig": "fqn_to_config", "ModuleFqnToConfig": "module_fqn_to_config"}
_DEFAULT = "_default"
_REGEX = "re:"
_GRANULARITIES = {"PerRow": Granularity.CHANNEL, "PerTensor": Granularity.TENSOR, "PerBlock": Granularity.BLOCK}


def read_torchao(fields: ConfigFields) -> list[Rule]:
    """What is left out, then layers by name, then by regular expression, then all others."""
    _refuse_pickles(fields)
    if fields.get("include_input_output_embeddings"):
        raise fields.error("include_input_output_embeddings", "false is needed")
    config = fields.child("quant_type").child("default")
    kind = one_of(config, "_type", (*_CLASSES, *_BY_NAME))
    rules = _by_name(config.child("_data").child(_BY_NAME[kind])) if kind in _BY_NAME else [_all(_scheme(config))]
    return [*left_out(fields, "modules_to_not_convert", Match.WEIGHT), *head_left_out(fields), *rules]


def _refuse_pickles(fields: ConfigFields) -> None:
    try:
        paths = find_weight_files(fields.path.parent)
    except ModelError:
        return  # without weights there may be dummy ones
    if pickled := [path.name for path in paths if path.suffix != ".safetensors"]:
        needed = ".safetensors files are needed, as transformers 5 saves them"
        raise fields.error(
            "quant_method", f"{needed}: {pickled[0]} holds objects of torchao's, which take code to load"
        )


def _by_name(configs: ConfigFields) -> list[Rule]:
    named, matched, others = [], [], []
    for key in configs.values:
        scheme = _scheme(configs.child(key)) if configs.has(key) else None
        if key == _DEFAULT:
            others.append(_all(scheme, configs.place(key)))
        elif key.startswith(_REGEX):
            pattern = checked_regex(configs, key, key.removeprefix(_REGEX))
            matched.append(Rule(Match.WHOLE_REGEX, pattern, scheme, configs.place(key)))
        else:
            named.append(Rule(Match.EXACT, key.removesuffix(".weight"), scheme, configs.place(key)))
    return [*named, *matched, *others, _all(None, configs.place(_DEFAULT))]


def _all(scheme: WeightScheme | None, source: str = "") -> Rule:
    return Rule(Match.ALL, "", scheme, source)


def _scheme(config: ConfigFields) -> WeightScheme:
    kind, activations, usual = _CLASSES[one_of(config, "_type", _CLASSES)]
    one_of(config, "_version", (2,))
    fields = config.child("_data")
    _check(fields, "weight_dtype", "float8_e4m3fn")
    _check(fields, "activation_dtype", "float8_e4m3fn")
    _check(fields, "packing_format", "PLAIN")
    _check(fields, "act_mapping_type", "SYMMETRIC")
    if fields.has("group_size"):
        raise fields.error("group_size", "null is needed")
    granularity = _granularity(fields, usual)
    scheme = WeightScheme(Storage.EIGHT_BIT, kind, granularity, activations=activations)
    if granularity is Granularity.BLOCK:
        return replace(scheme, group_size=BLOCK)
    return scheme


def _check(fields: ConfigFields, key: str, needed: str) -> None:
    """Raise ModelError unless the object under `key`, if there is one, stands for this value."""
    if fields.has(key):
        one_of(fields.child(key), "_data", (needed,))


def _granularity(fields: ConfigFields, usual: str) -> Granularity:
    """That of the weights, which is the second if the activations have one too."""
    value = fields.get("granularity")
    if not isinstance(value, list):
        return _one_granularity(given(fields.child("granularity"), {"_type": usual}), [BLOCK, BLOCK])
    if len(value) != 2 or None in value:
        raise fields.error("granularity", "an object is needed, or two: the activations' and the weights'")
    both = ConfigFields(fields.path, dict(zip(("0", "1"), value, strict=True)), f"{fields.prefix}granularity.")
    _one_granularity(both.child("0"), [1, BLOCK])
    return _one_granularity(both.child("1"), [BLOCK, BLOCK])


def _one_granularity(fields: ConfigFields, block_size: list[int]) -> Granularity:
    found = _GRANULARITIES[one_of(fields, "_type", _GRANULARITIES)]
    data = given(fields.child("_data"), {"dim": -1})
    if found is Granularity.CHANNEL:
        one_of(data, "dim", (-1,))
    if found is Granularity.BLOCK and data.get("block_size") != block_size:
        raise fields.error("_data", f"a block_size of {block_size} is needed")
    return found
