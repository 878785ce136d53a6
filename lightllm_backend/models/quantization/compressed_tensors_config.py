# SPDX-License-Identifier: Apache-2.0
"""Reads the quantization_config of compressed-tensors, which llm-compressor writes. Standard library only."""

from __future__ import annotations

from collections.abc import Iterator

from lightllm_backend.models.config_fields import ConfigFields
from lightllm_backend.models.quantization.fields import checked_regex, given, group_size, names, one_of
from lightllm_backend.models.quantization.scheme import (
    Activations,
    Granularity,
    Kind,
    Match,
    Rule,
    Storage,
    WeightScheme,
)

FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
_REGEX = "re:"
_CLASS = "Linear"  # of every layer that has a scheme
_BLOCK = [128, 128]


def read_compressed_tensors(fields: ConfigFields) -> list[Rule]:
    """What is ignored, then the targets of all groups: names before regular expressions before classes."""
    fields = given(fields, {"format": None})
    if fields.child("sparsity_config").get("format") not in (None, "dense"):
        raise fields.error("sparsity_config", "a format of 'dense' is needed")
    if fields.child("transform_config").get("config_groups"):
        raise fields.error("transform_config", "an empty object is needed")
    rules = _rules(fields, "ignore", None)
    groups = fields.child("config_groups")
    if not groups.values:
        raise fields.error("config_groups", "at least one group is needed")
    targets = []
    for key in groups.values:
        group = groups.child(key)
        targets += _rules(group, "targets", _scheme(group, fields))
    for match in (Match.EXACT, Match.REGEX, Match.ALL):
        rules += sorted((rule for rule in targets if rule.match is match), key=lambda rule: rule.pattern)
    return [*rules, Rule(Match.ALL, "", None, fields.place("config_groups"))]


def _rules(fields: ConfigFields, key: str, scheme: WeightScheme | None) -> list[Rule]:
    return [Rule(*_pattern(fields, key, name), scheme, fields.place(key)) for name in names(fields, key)]


def _pattern(fields: ConfigFields, key: str, name: str) -> tuple[Match, str]:
    if name.startswith(_REGEX):
        return Match.REGEX, checked_regex(fields, key, name.removeprefix(_REGEX))
    return (Match.ALL, "") if name == _CLASS else (Match.EXACT, name)


def _scheme(group: ConfigFields, fields: ConfigFields) -> WeightScheme:
    owner = group if group.has("format") else fields
    stored = one_of(owner, "format", FORMATS)
    if group.has("output_activations"):
        raise group.error("output_activations", "null is needed")
    weights, activations = group.child("weights"), group.child("input_activations")
    if not weights.values:
        raise group.error("weights", "an object is needed")
    weights = given(weights, {"symmetric": True, "type": "int", "dynamic": False})
    kind = _kind(weights, stored)
    granularity = _granularity(weights, kind, stored)
    size = group_size(weights, "group_size") if granularity is Granularity.GROUP else 0
    symmetric = weights.flag("symmetric")
    if stored != "pack-quantized" and not symmetric:
        raise weights.error("symmetric", "true is needed, except in pack-quantized weights")
    if stored == "pack-quantized" and activations.values:
        raise group.error("input_activations", "null is needed beside pack-quantized weights")
    return WeightScheme(
        Storage.PACKED if stored == "pack-quantized" else Storage.EIGHT_BIT,
        kind,
        granularity,
        _BLOCK[1] if granularity is Granularity.BLOCK else size,
        has_zeros=not symmetric,
        has_order=weights.get("actorder") in ("group", "dynamic", True),
        activations=_activations(activations, kind, granularity) if activations.values else Activations.AS_THEY_ARE,
    )


def _kind(weights: ConfigFields, stored: str) -> Kind:
    types = {"pack-quantized": ("int",), "int-quantized": ("int",), "float-quantized": ("float",)}
    is_float = one_of(weights, "type", types.get(stored, ("int", "float"))) == "float"
    bits = one_of(weights, "num_bits", (4, 8) if stored == "pack-quantized" else (8,))
    return Kind.FP8 if is_float else {4: Kind.INT4, 8: Kind.INT8}[bits]


def _granularity(weights: ConfigFields, kind: Kind, stored: str) -> Granularity:
    if not weights.has("strategy"):
        size = weights.get("group_size")
        weights = given(weights, {"strategy": "tensor" if size is None else "channel" if size == -1 else "group"})
    allowed = ["channel", "group"] if stored == "pack-quantized" else ["tensor", "channel"]
    if kind is Kind.FP8:
        allowed.append("block")
    granularity = Granularity(one_of(weights, "strategy", allowed))
    if granularity is Granularity.BLOCK and weights.get("block_structure") not in (_BLOCK, "128x128"):
        raise weights.error("block_structure", f"allowed: {_BLOCK}")
    return granularity


def _activations(fields: ConfigFields, kind: Kind, granularity: Granularity) -> Activations:
    fields = given(fields, {"symmetric": True, "type": "int", "dynamic": False, "strategy": "tensor"})
    one_of(fields, "num_bits", (8,))
    one_of(fields, "type", ("float",) if kind is Kind.FP8 else ("int",))
    if not fields.flag("symmetric"):
        raise fields.error("symmetric", "true is needed")
    if not fields.flag("dynamic"):
        one_of(fields, "strategy", ("tensor",))
        return Activations.STATIC
    one_of(fields, "strategy", tuple(_dynamic_strategies(granularity)))
    return Activations.DYNAMIC


def _dynamic_strategies(granularity: Granularity) -> Iterator[str]:
    """Scales by tensor are taken by token, which is finer."""
    yield from ("token", "tensor") if granularity is not Granularity.BLOCK else ("group",)
