# SPDX-License-Identifier: Apache-2.0
"""Quantization: which linear layers of a model have weights of 4 or 8 bits, and the WeightScheme of each.

Standard library only, so that processes without torch can read a model's configuration.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """What a weight's numbers are."""

    INT4 = "int4"
    INT8 = "int8"
    FP8 = "fp8"  # float8_e4m3fn


class Storage(Enum):
    """How the tensors of a linear layer lie in a checkpoint. A module of this folder reads each: see readers.py."""

    AWQ = "AutoAWQ's gemm"
    GPTQ = "gptq"
    GPTQ_V2 = "gptq_v2"
    PACKED = "pack-quantized"
    EIGHT_BIT = "weight and weight_scale"
    ON_THE_FLY = "a float weight, to be quantised"


class Granularity(Enum):
    """The weights that share a scale in the checkpoint."""

    TENSOR = "tensor"
    CHANNEL = "channel"  # an output feature's
    GROUP = "group"  # a group of an output feature's
    BLOCK = "block"  # 128 x 128


class Activations(Enum):
    """What the checkpoint wants the input of a product to be."""

    AS_THEY_ARE = "16 bits"
    DYNAMIC = "8 bits, with scales of the moment"
    STATIC = "8 bits, with input_scale"


@dataclass(frozen=True)
class WeightScheme:
    """How the weight of one linear layer is stored."""

    storage: Storage
    kind: Kind
    granularity: Granularity
    group_size: int = 0  # input features that share a scale; 0: all of them
    has_zeros: bool = False
    has_order: bool = False  # g_idx says which group each input feature belongs to
    activations: Activations = Activations.AS_THEY_ARE
    scale_name: str = "weight_scale"  # of the scales' tensor, if the storage leaves it open

    def column_units(self) -> Iterator[int]:
        """Numbers that must divide each rank's share of the input features if ranks split them."""
        if self.group_size:
            yield self.group_size
        if self.kind is Kind.INT4:
            yield 8  # in a word


class Match(Enum):
    """How a pattern is compared with a layer's name, like model.layers.0.mlp.down_proj."""

    ALL = "all"
    EXACT = "exact"
    REGEX = "regex"  # from the name's beginning
    WHOLE_REGEX = "whole regex"  # of the whole name, or of its weight's
    WEIGHT = "weight"  # as transformers 5 compares its weight's name: see applies
    SEARCH = "search"  # a regular expression, anywhere in the name
    PARTS = "parts"  # the pattern's dotted parts follow each other somewhere in the name
    WILDCARDS = "wildcards"  # * stands for any characters


@dataclass(frozen=True)
class Rule:
    """The scheme of the layers whose names match; None: they are not quantised."""

    match: Match
    pattern: str
    scheme: WeightScheme | None

    def applies(self, name: str) -> bool:
        if self.match is Match.EXACT:
            return name == self.pattern
        if self.match is Match.REGEX:
            return re.match(self.pattern, name) is not None
        if self.match is Match.WHOLE_REGEX:
            return any(re.fullmatch(self.pattern, whole) for whole in (name, f"{name}.weight"))
        if self.match is Match.WEIGHT:  # its end, or a regular expression from its beginning to a dot or the end
            weight, boundary = f"{name}.weight", r"(?:(?<=\.)|(?=\.|$))"
            return weight.endswith(self.pattern) or re.match(f"(?:{self.pattern}){boundary}", weight) is not None
        if self.match is Match.SEARCH:
            return re.search(self.pattern, name) is not None
        if self.match is Match.PARTS:
            return f".{self.pattern}." in f".{name}."
        if self.match is Match.WILDCARDS:
            return re.fullmatch(re.escape(self.pattern).replace(r"\*", ".*"), name) is not None
        return True


@dataclass(frozen=True)
class Quantization:
    """The quantisation of a model; by default there is none."""

    method: str = ""  # its name in errors
    rules: tuple[Rule, ...] = ()  # the first that applies to a name counts
    finds_grids: bool = False  # of floats that 4 or 8 bits express: see kernels.quantized.grid_weight

    def scheme(self, name: str) -> WeightScheme | None:
        """The scheme of the linear layer of this name; None if its weight is not quantised."""
        return next((rule.scheme for rule in self.rules if rule.applies(name)), None)

    def splits_into(self, columns: int, ranks: int) -> bool:
        """Whether ranks can split the input features of any layer without cutting a group."""
        if ranks == 1:
            return True
        units = [unit for rule in self.rules if rule.scheme is not None for unit in rule.scheme.column_units()]
        return not self.has_order and all(columns // ranks % unit == 0 for unit in units)

    @property
    def has_order(self) -> bool:
        """Whether the input features of any layer are in an order of its own."""
        return any(rule.scheme is not None and rule.scheme.has_order for rule in self.rules)

    @property
    def rounds_activations(self) -> bool:
        """Whether any layer wants its input in fewer bits as well."""
        schemes = [rule.scheme for rule in self.rules if rule.scheme is not None]
        return any(scheme.activations is not Activations.AS_THEY_ARE for scheme in schemes)


UNQUANTISED = Quantization()
