# SPDX-License-Identifier: Apache-2.0
"""Reads what a model directory says of its quantisation. Every fault, and every unknown method, is a ModelError.

Imports no torch. The keys are those that the tools write: AutoAWQ and llm-awq, AutoGPTQ and GPTQModel, AutoFP8 and
transformers' fine-grained fp8, Meta's FBGEMM, NVIDIA's ModelOpt; auto_round_config.py, compressed_tensors_config.py and
torchao_config.py have those of AutoRound, compressed-tensors and torchao.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightllm_backend.models.config_fields import ConfigFields
from lightllm_backend.models.errors import ModelError
from lightllm_backend.models.quantization.auto_round_config import read_auto_round
from lightllm_backend.models.quantization.compressed_tensors_config import read_compressed_tensors
from lightllm_backend.models.quantization.fields import (
    BLOCK,
    HEAD,
    checked_regex,
    given,
    group_size,
    head_left_out,
    left_out,
    nested_names,
    one_of,
)
from lightllm_backend.models.quantization.scheme import (
    UNQUANTISED,
    Activations,
    Granularity,
    Kind,
    Match,
    Quantization,
    Rule,
    Storage,
    WeightScheme,
)
from lightllm_backend.models.quantization.torchao_config import read_torchao

# Files beside config.json that only a quantised checkpoint has, and the method of one that does not name its own.
QUANTIZATION_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}

_INT = {4: Kind.INT4, 8: Kind.INT8}

# By ModelOpt's `quant_algo`; in mixed precision each layer has its own.
_MIXED = "MIXED_PRECISION"
_MODELOPT = {
    "FP8": WeightScheme(Storage.EIGHT_BIT, Kind.FP8, Granularity.TENSOR, activations=Activations.STATIC),
    "FP8_PER_CHANNEL_PER_TOKEN": WeightScheme(
        Storage.EIGHT_BIT, Kind.FP8, Granularity.CHANNEL, activations=Activations.DYNAMIC
    ),
    # As ModelOpt 0.47 writes it, and as vLLM calls it.
    **dict.fromkeys(("fp8_pb_wo", "FP8_PB_WO"), WeightScheme(Storage.EIGHT_BIT, Kind.FP8, Granularity.BLOCK, BLOCK)),
    "W8A16": WeightScheme(Storage.EIGHT_BIT, Kind.INT8, Granularity.CHANNEL),
}


def read_quantization(directory: Path, config: ConfigFields) -> Quantization:
    """The quantisation that config.json tells of, or else a file beside it."""
    if config.has("compression_config"):
        raise config.error("compression_config", f"a quantization_config is needed, of one of {', '.join(METHODS)}")
    if config.has("quantization_config"):
        return _read(config.child("quantization_config"), None)
    for name, method in QUANTIZATION_FILES.items():
        if (directory / name).exists():
            fields = ConfigFields.read(directory / name)
            return _read(fields.child("quantization") if method == "modelopt" else fields, method)
    return UNQUANTISED


def _read(fields: ConfigFields, method: str | None) -> Quantization:
    fields = given(fields, {"quant_method": method})
    name = fields.get("quant_method")
    if not isinstance(name, str) or name not in METHODS:
        raise fields.error("quant_method", f"methods that load: {', '.join(METHODS)}")
    rules = tuple(METHODS[name](fields))
    return Quantization(name, rules, warnings=_warnings(fields) if name == "fbgemm_fp8" else ())


_HEAD_LEFT_OUT = Rule(Match.EXACT, HEAD, None)


def _all(scheme: WeightScheme) -> Rule:
    return Rule(Match.ALL, "", scheme)


def _awq(fields: ConfigFields) -> list[Rule]:
    fields = given(fields, {"bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"})
    bits, size = fields.either("w_bit", "bits"), fields.either("q_group_size", "group_size")
    if fields.get(bits) != 4:
        raise fields.error(bits, "allowed: 4")
    version = fields.either("format", "version")
    if str(fields.get(version)).lower() != "gemm":
        raise fields.error(version, "allowed: 'gemm'")
    scheme = WeightScheme(
        Storage.AWQ, Kind.INT4, Granularity.GROUP, group_size(fields, size), has_zeros=fields.flag("zero_point")
    )
    return [*left_out(fields, "modules_to_not_convert"), _HEAD_LEFT_OUT, _all(scheme)]


def _gptq(fields: ConfigFields) -> list[Rule]:
    fields = given(
        fields,
        {"bits": 4, "group_size": 128, "sym": True, "desc_act": False, "lm_head": False, "is_marlin_format": False,
         "checkpoint_format": "gptq", "pack_dtype": "int32"},
    )  # fmt: skip
    if fields.flag("is_marlin_format"):
        raise fields.error("is_marlin_format", "false is needed")
    one_of(fields, "pack_dtype", ("int32",))
    stored = one_of(fields, fields.either("format", "checkpoint_format"), ("gptq", "gptq_v2"))
    scheme = WeightScheme(
        Storage(stored),
        _INT[one_of(fields, "bits", _INT)],
        Granularity.GROUP,
        group_size(fields, "group_size"),
        has_zeros=not fields.flag("sym"),
        has_order=fields.flag("desc_act"),
    )
    rules = [] if fields.flag("lm_head") else [_HEAD_LEFT_OUT]
    rules += _gptq_dynamic(fields, scheme)
    key = "modules_in_block_to_quantize"
    inside = [Rule(Match.PARTS, name, scheme) for name in nested_names(fields, key)]
    return [*rules, *inside, Rule(Match.ALL, "", None, fields.place(key)) if inside else _all(scheme)]


def _gptq_dynamic(fields: ConfigFields, scheme: WeightScheme) -> list[Rule]:
    """GPTQModel's exceptions: a pattern that begins with "-:" leaves layers out, others change some of the keys."""
    rules: list[Rule] = []
    exceptions = fields.child("dynamic")
    for key in exceptions.values:
        sign, separator, pattern = key.partition(":")
        pattern = pattern if separator and sign in "+-" else key
        checked_regex(exceptions, key, pattern)
        if separator and sign == "-":
            rules.append(Rule(Match.REGEX, pattern, None, exceptions.place(key)))
            continue
        own = exceptions.child(key)
        changed: dict[str, Any] = {}
        if own.has("bits"):
            changed["kind"] = _INT[one_of(own, "bits", _INT)]
        if own.has("group_size"):
            changed["group_size"] = group_size(own, "group_size")
        for flag, field, meaning in (("sym", "has_zeros", False), ("desc_act", "has_order", True)):
            if own.has(flag):
                changed[field] = given(own, {flag: None}).flag(flag) == meaning
        rules.append(Rule(Match.REGEX, pattern, replace(scheme, **changed), exceptions.place(key)))
    return rules


def _fp8(fields: ConfigFields) -> list[Rule]:
    """AutoFP8's fp8, and that of DeepSeek and Qwen in blocks."""
    fields = given(fields, {"activation_scheme": "dynamic", "fmt": "e4m3", "scale_fmt": "float"})
    one_of(fields, "fmt", ("e4m3", "float8_e4m3fn"))
    one_of(fields, "scale_fmt", ("float", "float32", "ue8m0"))  # the scales' tensors tell which
    if fields.has("weight_scale_semantics"):  # GPTQModel's: it divides by what it calls weight_scale_inv
        raise fields.error("weight_scale_semantics", "null is needed, as weights are multiplied by their scales")
    activations = {"dynamic": Activations.DYNAMIC, "static": Activations.STATIC}
    chosen = activations[one_of(fields, "activation_scheme", activations)]
    scheme = WeightScheme(Storage.EIGHT_BIT, Kind.FP8, Granularity.TENSOR, activations=chosen)
    if fields.has("weight_block_size"):
        if fields.get("weight_block_size") != [BLOCK, BLOCK]:
            raise fields.error("weight_block_size", f"allowed: [{BLOCK}, {BLOCK}]")
        one_of(fields, "activation_scheme", ("dynamic",))
        scheme = replace(scheme, granularity=Granularity.BLOCK, group_size=BLOCK, scale_name="weight_scale_inv")
    key = fields.either("modules_to_not_convert", "ignored_layers")
    return [*left_out(fields, key, Match.MODULE), *head_left_out(fields, key), _all(scheme)]


def _fbgemm_fp8(fields: ConfigFields) -> list[Rule]:
    """Meta's, which transformers writes too."""
    scheme = WeightScheme(Storage.EIGHT_BIT, Kind.FP8, Granularity.CHANNEL, activations=Activations.DYNAMIC)
    return [*left_out(fields, "modules_to_not_convert", Match.MODULE), *head_left_out(fields), _all(scheme)]


def _warnings(fields: ConfigFields) -> tuple[str, ...]:
    """FBGEMM clamps activations to `activation_scale_ub`, so that one outlier does not make the others coarse."""
    key = "activation_scale_ub"
    if not fields.has(key):
        return ()
    bound = fields.positive(key)
    return (f"{fields.place(key)} is {bound:g}, but activations beyond it are not clamped: a scale spans all of them",)


def _modelopt(fields: ConfigFields) -> list[Rule]:
    if one_of(fields, "quant_algo", (*_MODELOPT, _MIXED)) == _MIXED:
        layers = fields.child("quantized_layers")
        named = [Rule(Match.EXACT, name, _modelopt_scheme(layers.child(name))) for name in layers.values]
        return [*named, Rule(Match.ALL, "", None, fields.place("quantized_layers"))]
    scheme = _modelopt_scheme(fields)
    lists = [(key, match) for key in ("exclude_modules", "ignore") for match in (Match.WILDCARDS, Match.PARTS)]
    return [*(rule for key, match in lists for rule in left_out(fields, key, match)), _all(scheme)]


def _modelopt_scheme(fields: ConfigFields) -> WeightScheme:
    return _MODELOPT[one_of(fields, "quant_algo", _MODELOPT)]


# By config.json's `quant_method`.
METHODS: dict[str, Callable[[ConfigFields], list[Rule]]] = {
    "awq": _awq,
    "gptq": _gptq,
    "auto-round": read_auto_round,
    "compressed-tensors": read_compressed_tensors,
    "fp8": _fp8,
    "fbgemm_fp8": _fbgemm_fp8,
    "modelopt": _modelopt,
    "torchao": read_torchao,
}


def on_the_fly(weight_dtype: str, quantization: Quantization, shares: Iterable[int]) -> Quantization:
    """The quantisation of a float checkpoint by the setting `weight_dtype`: int4, int8 or fp8.

    `shares` are the numbers of input features that a rank holds of the linear layers. Groups of int4 are the largest
    that divide them all.
    """
    if quantization.rules:
        raise ModelError(
            f"weight_dtype is {weight_dtype!r}, but the checkpoint is quantised already ({quantization.method}); "
            "allowed: 'auto'"
        )
    scheme = _by_channel(weight_dtype)
    if scheme.kind is Kind.INT4:
        shares = sorted(set(shares))
        fitting = [size for size in (128, 64, 32) if all(share % size == 0 for share in shares)]
        if not fitting:
            raise ModelError(
                f"weight_dtype is {weight_dtype!r}, whose groups of 32, 64 or 128 do not divide the "
                f"{', '.join(map(str, shares))} input features of a rank's layers; allowed: 'auto', 'fp8', 'int8'"
            )
        scheme = replace(scheme, granularity=Granularity.GROUP, group_size=fitting[0])
    return Quantization(f"weight_dtype {weight_dtype}", (_HEAD_LEFT_OUT, _all(scheme)))


def with_head(head_dtype: str, quantization: Quantization) -> Quantization:
    """The same with a head that is quantised on the fly by the setting `head_dtype`: int8 or fp8."""
    if quantization.scheme(HEAD) is not None:
        raise ModelError(
            f"head_dtype is {head_dtype!r}, but the checkpoint's head is quantised already ({quantization.method}); "
            "allowed: 'auto'"
        )
    head = Rule(Match.EXACT, HEAD, _by_channel(head_dtype))
    return Quantization(quantization.method or f"head_dtype {head_dtype}", (head, *quantization.rules))


def _by_channel(dtype: str) -> WeightScheme:
    activations = Activations.DYNAMIC if dtype == Kind.FP8.value else Activations.AS_THEY_ARE
    return WeightScheme(Storage.ON_THE_FLY, Kind(dtype), Granularity.CHANNEL, activations=activations)
