# SPDX-License-Identifier: Apache-2.0
"""Reads the quantization_config of AutoRound, whose tensors lie as those of GPTQ or AWQ do. Standard library only."""

from __future__ import annotations

import re

from lightllm_backend.models.config_fields import ConfigFields
from lightllm_backend.models.quantization.fields import HEAD, checked_regex, given, group_size, nested_names, one_of
from lightllm_backend.models.quantization.scheme import Granularity, Kind, Match, Rule, Storage, WeightScheme

# By `packing_format`; AutoRound has two names of some. What it calls by its own name alone is gptq_v2 without g_idx.
_STORAGES = {
    "auto_round:auto_gptq": Storage.GPTQ,
    "auto_round:gptq": Storage.GPTQ,
    "auto_round:auto_awq": Storage.AWQ,
    "auto_round:awq": Storage.AWQ,
    "auto_round": Storage.GPTQ_V2,
    "auto_round:gptqmodel": Storage.GPTQ_V2,
}
_KINDS = {4: Kind.INT4, 8: Kind.INT8}
_FLOAT_BITS = (16, 32)
_IN_REGEX = frozenset("*+?^$()[]{}|\\")


def read_auto_round(fields: ConfigFields) -> list[Rule]:
    """The layers that `extra_config` names, then those that match its regular expressions, then those of the blocks."""
    fields = given(fields, {"bits": 4, "group_size": 128, "sym": True, "data_type": "int", "act_bits": 16,
                            "packing_format": "auto_round:auto_gptq"})  # fmt: skip
    storage = _STORAGES[one_of(fields, "packing_format", _STORAGES)]
    for key in ("rotation_config", "spinquant_config"):
        if fields.get(key):
            raise fields.error(key, "null is needed")
    named, matched = [], []
    exceptions = fields.child("extra_config")
    for key in exceptions.values:
        scheme = _scheme(given(exceptions.child(key), {**fields.defaults, **fields.values}), storage)
        if _IN_REGEX.isdisjoint(key):
            named.append(Rule(Match.EXACT, key, scheme, exceptions.place(key)))
        else:
            matched.append(Rule(Match.SEARCH, checked_regex(exceptions, key, key), scheme, exceptions.place(key)))
    scheme = _scheme(fields, storage)
    key = fields.either("block_name_to_quantize", "to_quant_block_names")
    if blocks := _blocks(fields, key):
        others = [Rule(Match.REGEX, rf"{re.escape(name)}(\.|$)", scheme) for name in blocks]
        others.append(Rule(Match.ALL, "", None, fields.place(key)))
    else:
        others = [Rule(Match.EXACT, HEAD, None), Rule(Match.ALL, "", scheme)]
    return [*named, *matched, *others]


def _scheme(fields: ConfigFields, storage: Storage) -> WeightScheme | None:
    kinds = {4: Kind.INT4} if storage is Storage.AWQ else _KINDS
    bits = one_of(fields, "bits", [*kinds, *_FLOAT_BITS])
    if bits in _FLOAT_BITS:
        return None
    one_of(fields, "data_type", ("int",))
    one_of(fields, "act_bits", _FLOAT_BITS)
    size = group_size(fields, "group_size")
    return WeightScheme(storage, kinds[bits], Granularity.GROUP, size, has_zeros=not fields.flag("sym"))


def _blocks(fields: ConfigFields, key: str) -> list[str]:
    """The beginnings of the names of layers that are quantised; none: all layers but the head are."""
    value = fields.get(key)
    if isinstance(value, str):
        return [name.strip() for name in value.split(",") if name.strip()]
    return nested_names(fields, key)
