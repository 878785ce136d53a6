# SPDX-License-Identifier: Apache-2.0
"""StoredMatrix: a quantised matrix of a checkpoint and this rank's part of it; and an empty QuantizedWeight to fill."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from lightllm_backend.kernels.quantized.weight import QuantizedWeight
from lightllm_backend.models.errors import ModelError
from lightllm_backend.models.quantization.scheme import Activations, Kind, Storage, WeightScheme

# In an order that no g_idx has set yet.
UNKNOWN_ORDER = -1

_DTYPES = {Kind.INT4: torch.int32, Kind.INT8: torch.int8, Kind.FP8: torch.float8_e4m3fn}
# The storages whose tools refuse a last group that is smaller than others.
_WHOLE_GROUPS = (Storage.AWQ, Storage.PACKED, Storage.ON_THE_FLY)


class Span(NamedTuple):
    """The features that a rank holds: `held` of `full`, from `start` on."""

    full: int
    start: int
    held: int

    @property
    def stop(self) -> int:
        return self.start + self.held

    @property
    def is_whole(self) -> bool:
        return self.held == self.full


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix [rows.full, columns.full] of a checkpoint, and the rows of a parameter that take this rank's part."""

    name: str
    path: str  # what stands before the name in the checkpoint, for errors
    rows: Span
    columns: Span
    scheme: WeightScheme
    weight: QuantizedWeight

    @property
    def full_groups(self) -> int:
        """The groups of all input features."""
        return -(-self.columns.full // self.full_group_size)

    @property
    def full_group_size(self) -> int:
        """The input features that share a scale in the checkpoint."""
        return self.scheme.group_size or self.columns.full

    @property
    def groups(self) -> slice:
        """This rank's groups among all. If a rank holds a part of the one that there is, it holds its scale."""
        first = self.columns.start // self.full_group_size
        return slice(first, first + len(self.weight.scales))

    @property
    def row_slice(self) -> slice:
        return slice(self.rows.start, self.rows.stop)

    @property
    def column_slice(self) -> slice:
        return slice(self.columns.start, self.columns.stop)


def empty_weight(
    scheme: WeightScheme, name: str, rows: int, columns: Span, dtype: torch.dtype, device: torch.device
) -> QuantizedWeight:
    """An uninitialised weight of `rows` output features; `dtype` is that of the model's activations.

    Raises ModelError, with the layer's name, if this rank's input features are not whole groups.
    """
    _check_columns(scheme, name, columns)
    group_size = scheme.group_size or columns.held
    groups = -(-columns.held // group_size)
    is_int4 = scheme.kind is Kind.INT4
    # Checkpoints have scales of int4 in 16 bits, which a float16 holds; those of 8 bits are few, or smaller.
    scale_dtype = torch.float16 if is_int4 and dtype != torch.float32 else torch.float32
    has_zeros, has_order = scheme.has_zeros, scheme.has_order
    is_static = scheme.activations is Activations.STATIC
    return QuantizedWeight(
        torch.empty(rows, columns.held // (8 if is_int4 else 1), dtype=_DTYPES[scheme.kind], device=device),
        torch.empty(groups, rows, dtype=scale_dtype, device=device),
        group_size,
        torch.empty(groups, rows, dtype=torch.int8, device=device) if has_zeros else None,
        torch.full((columns.held,), UNKNOWN_ORDER, dtype=torch.int32, device=device) if has_order else None,
        scheme.activations is not Activations.AS_THEY_ARE,
        torch.zeros(1, device=device) if is_static else None,  # grows to the largest of the fused matrices
    )


def _check_columns(scheme: WeightScheme, name: str, columns: Span) -> None:
    units = list(scheme.column_units())
    checked = units if scheme.storage in _WHOLE_GROUPS else units[bool(scheme.group_size) :]
    for unit in checked:
        if columns.full % unit != 0:
            raise ModelError(
                f"{name} has {columns.full} input features; a multiple of {unit} is needed: {scheme_words(scheme)}"
            )
    if columns.is_whole:
        return
    if scheme.has_order:
        raise ModelError(
            f"{name} has groups in an order of its own (desc_act), which ranks cannot split; allowed: tp = 1"
        )
    if any(columns.held % unit != 0 for unit in units):
        ranks = range(1, columns.full + 1)
        allowed = [n for n in ranks if columns.full % n == 0 and all(columns.full // n % unit == 0 for unit in units)]
        raise ModelError(
            f"{name}: tp = {columns.full // columns.held} gives a rank {columns.held} of {columns.full} input "
            f"features, which cuts {scheme_words(scheme)}; allowed: {', '.join(map(str, allowed or [1]))}"
        )


def scheme_words(scheme: WeightScheme) -> str:
    """The scheme, for errors."""
    size = f" in groups of {scheme.group_size}" if scheme.group_size else ""
    return f"{scheme.kind.value}{size}"
