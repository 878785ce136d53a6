# SPDX-License-Identifier: Apache-2.0
"""Quantization: which linear layers of a model have weights of 4 or 8 bits, and the WeightScheme of each.

Imports no torch, so that processes without it can read a model's configuration.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cached_property

import regex

from lightllm_backend.models.errors import ModelError

# A comparison takes microseconds, unless a regular expression backtracks without end.
MAX_MATCH_SECONDS = 1.0

# Where transformers 5 lets a pattern end that is compared with a module's name.
_BOUNDARY = r"(?:(?<=\.)|(?=\.|$))"


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
    MODULE = "module"  # as transformers 5 compares it: its end, or a regular expression from its beginning to a dot
    WEIGHT = "weight"  # so is its weight's name
    SEARCH = "search"  # a regular expression, anywhere in the name
    PARTS = "parts"  # the pattern's dotted parts follow each other somewhere in the name
    WILDCARDS = "wildcards"  # * stands for any characters


@dataclass(frozen=True)
class Rule:
    """The scheme of the layers whose names match; None: they are not quantised."""

    match: Match
    pattern: str
    scheme: WeightScheme | None
    source: str = ""  # the file and the key that say so, for errors; none: the method does

    def applies(self, name: str) -> bool:
        """Whether the layer's name matches. Raises ModelError if the comparison takes too long."""
        weight = f"{name}.weight"
        if self.match is Match.EXACT:
            return name == self.pattern
        if self.match is Match.PARTS:
            return f".{self.pattern}." in f".{name}."
        if self.match is Match.REGEX:
            return self._is_found(self._expression.match, name)
        if self.match is Match.WHOLE_REGEX:
            return any(self._is_found(self._expression.fullmatch, whole) for whole in (name, weight))
        if self.match in (Match.MODULE, Match.WEIGHT):
            compared = name if self.match is Match.MODULE else weight
            return compared.endswith(self.pattern) or self._is_found(self._expression.match, compared)
        if self.match is Match.SEARCH:
            return self._is_found(self._expression.search, name)
        if self.match is Match.WILDCARDS:
            return self._is_found(self._expression.fullmatch, name)
        return True

    @cached_property
    def _expression(self) -> regex.Pattern[str]:
        pattern = self.pattern
        if self.match in (Match.MODULE, Match.WEIGHT):
            pattern = f"(?:{pattern}){_BOUNDARY}"
        elif self.match is Match.WILDCARDS:
            pattern = re.escape(pattern).replace(r"\*", ".*")
        return regex.compile(pattern)

    def _is_found(self, compare: Callable[..., object], name: str) -> bool:
        try:
            return compare(name, timeout=MAX_MATCH_SECONDS) is not None
        except TimeoutError as error:
            raise ModelError(
                f"{self.source}: {self.pattern!r} takes more than {MAX_MATCH_SECONDS:g} s to compare with {name}; "
                "a pattern that backtracks less is needed"
            ) from error


@dataclass(frozen=True)
class Quantization:
    """The quantisation of a model; by default there is none."""

    method: str = ""  # its name in errors
    rules: tuple[Rule, ...] = ()  # the first that applies to a name counts
    finds_grids: bool = False  # of floats that 4 or 8 bits express: see kernels.quantized.grid_weight
    warnings: tuple[str, ...] = ()  # for the log when the model starts

    def scheme(self, name: str) -> WeightScheme | None:
        """The scheme of the linear layer of this name; None if its weight is not quantised."""
        rule = self._rule(name)
        return None if rule is None else rule.scheme

    def left_out_by(self, name: str) -> str:
        """What leaves the layer of this name unquantised: file, key and pattern, for errors; empty if no key does."""
        rule = self._rule(name)
        if rule is None or rule.scheme is not None or not rule.source:
            return ""
        pattern = "" if rule.match is Match.ALL else f" by {rule.pattern!r}"
        return f"{rule.source} leaves out {name}{pattern}"

    def _rule(self, name: str) -> Rule | None:
        return next((rule for rule in self.rules if rule.applies(name)), None)

    def splits_into(self, columns: int, ranks: int) -> bool:
        """Whether ranks can split the input features of any layer without cutting a group."""
        if ranks == 1:
            return True
        units = [unit for scheme in self._schemes for unit in scheme.column_units()]
        return not self.has_order and all(columns // ranks % unit == 0 for unit in units)

    @property
    def has_order(self) -> bool:
        """Whether the input features of any layer are in an order of its own."""
        return any(scheme.has_order for scheme in self._schemes)

    @property
    def has_fp8(self) -> bool:
        """Whether any layer has weights of fp8."""
        return any(scheme.kind is Kind.FP8 for scheme in self._schemes)

    @property
    def rounds_activations(self) -> bool:
        """Whether any layer wants its input in fewer bits as well."""
        return any(scheme.activations is not Activations.AS_THEY_ARE for scheme in self._schemes)

    @property
    def _schemes(self) -> list[WeightScheme]:
        return [rule.scheme for rule in self.rules if rule.scheme is not None]


UNQUANTISED = Quantization()
