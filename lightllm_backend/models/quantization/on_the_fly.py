# SPDX-License-Identifier: Apache-2.0
"""Quantises the weights of a float checkpoint while they are read, some rows of a tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightllm_backend.kernels.quantized.weight import INT4_ZERO, LIMITS, pack_int4
from lightllm_backend.models.errors import ModelError
from lightllm_backend.models.quantization.matrix import StoredMatrix
from lightllm_backend.models.quantization.slots import QuantizedSlot, scales_slot
from lightllm_backend.models.weight_files import Source
from lightllm_backend.models.weights import WeightSlot

# Numbers that are quantised at once: 16 MiB of float32, and some times that for the search.
_CHUNK = 1 << 22
# Shares of the scale at which a group's largest magnitude is the last number of 4 bits.
SHRINKS = tuple(0.6 + 0.04 * step for step in range(13))


def slots(matrix: StoredMatrix) -> dict[str, WeightSlot]:
    """weight [out, in], of any float dtype."""
    full_shape = (matrix.rows.full, matrix.columns.full)
    return {
        f"{matrix.name}.weight": FloatSlot(
            matrix.weight.values, full_shape, stands_for=matrix.rows.full * matrix.columns.full, matrix=matrix
        )
    }


@dataclass(frozen=True)
class FloatSlot(QuantizedSlot):
    """The slot of a float tensor, which fills a weight's values and scales."""

    matrix: StoredMatrix | None = None

    @property
    def nbytes(self) -> int:
        assert self.matrix is not None
        return self.matrix.weight.values.nbytes + self.matrix.weight.scales.nbytes

    def fill(self, source: Source) -> None:
        assert self.matrix is not None
        weight = self.matrix.weight
        for rows, read in self._chunks():
            part = source.read(read).to(self.target.device).float()
            if not bool(torch.isfinite(part).all()):
                raise ModelError(
                    f"{source.path}: {source.name} holds NaN or an infinite number; finite ones are needed"
                )
            groups = part.reshape(len(part), -1, weight.group_size)
            if weight.is_int4:
                values, scales = quantize_int4(groups, weight.scales.dtype)
                weight.values[rows] = pack_int4(values.flatten(1))
            else:
                values, scales = quantize_8_bits(groups, weight.values.dtype)
                weight.values[rows] = values.flatten(1)
            weight.scales[:, rows] = scales.t()

    def _chunks(self) -> Iterator[tuple[slice, tuple[slice, ...]]]:
        """Some of this rank's rows, and where they are in the checkpoint's tensor."""
        assert self.matrix is not None
        rows, columns = self.matrix.rows, self.matrix.columns
        step = max(1, _CHUNK // columns.held)
        for first in range(0, rows.held, step):
            last = min(first + step, rows.held)
            yield slice(first, last), (slice(rows.start + first, rows.start + last), self.matrix.column_slice)

    def randomize(self, generator: torch.Generator) -> None:
        assert self.matrix is not None
        super().randomize(generator)
        scales_slot(self.matrix, (), lambda scale: scale).randomize(generator)


def quantize_8_bits(groups: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Numbers [rows, groups, size] float32 in int8 or fp8, and scales [rows, groups], by each group's largest."""
    limit = LIMITS[dtype]
    scales = groups.abs().amax(-1) / limit
    values = (groups / scales.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)).clamp(-limit, limit)
    return (values.round() if dtype == torch.int8 else values).to(dtype), scales


def quantize_int4(groups: Tensor, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Numbers [rows, groups, size] float32 as 0 to 15, with 8 for zero, and scales [rows, groups].

    The largest magnitude becomes -8, the end of the range that is one further from zero, so a scale may be negative.
    Of several shrunken ranges, each with the scale that then fits best, the one with the least squared error is taken.
    """
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1)
    best_error = torch.full_like(largest, torch.inf)
    best_values, best_scales = torch.zeros_like(groups, dtype=torch.int8), torch.zeros_like(largest)
    for shrink in SHRINKS:
        scales = largest * (-shrink / INT4_ZERO)
        inverse = torch.where(scales == 0, 0.0, 1.0 / scales)
        values = (groups * inverse.unsqueeze(-1)).round_().clamp_(-INT4_ZERO, INT4_ZERO - 1)
        squares = values.square().sum(-1)
        fitted = torch.where(squares == 0, 0.0, (groups * values).sum(-1) / squares).to(scale_dtype).float()
        error = (groups - values * fitted.unsqueeze(-1)).square_().sum(-1)
        is_better = error < best_error
        best_error = torch.where(is_better, error, best_error)
        best_scales = torch.where(is_better, fitted, best_scales)
        best_values = torch.where(is_better.unsqueeze(-1), values.to(torch.int8), best_values)
    return best_values + INT4_ZERO, best_scales
