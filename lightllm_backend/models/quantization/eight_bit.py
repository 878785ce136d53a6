# SPDX-License-Identifier: Apache-2.0
"""Weights of 8 bits in a tensor of their own shape, with scales beside them: compressed-tensors' int-quantized and
float-quantized, AutoFP8, ModelOpt, torchao, and fp8 in blocks of 128 x 128."""

from __future__ import annotations

import torch
from torch import Tensor

from lightllm_backend.models.quantization.matrix import StoredMatrix
from lightllm_backend.models.quantization.scheme import Granularity, Kind
from lightllm_backend.models.quantization.slots import EqualSlot, QuantizedSlot, input_scale_slot, scales_slot
from lightllm_backend.models.weight_files import FLOATS
from lightllm_backend.models.weights import WeightSlot

# Powers of two (scale_fmt ue8m0) have a dtype of their own, which torch 2.6 lacks.
_BLOCK_SCALES = (*FLOATS, "float8_e8m0fnu") if hasattr(torch, "float8_e8m0fnu") else FLOATS
_DTYPES = {Kind.INT8: ("int8",), Kind.FP8: ("float8_e4m3fn",)}


def slots(matrix: StoredMatrix) -> dict[str, WeightSlot]:
    """weight [out, in]; weight_scale: one number, or [out, 1], or [out / 128, in / 128], which most tools but
    compressed-tensors call weight_scale_inv, or of ModelOpt [out / 128, 1, in / 128, 1]; input_scale: one number.

    torchao has zero points beside int8, which must be zeros.
    """
    rows, columns, weight = matrix.rows, matrix.columns, matrix.weight
    found: dict[str, WeightSlot] = {
        f"{matrix.name}.weight": QuantizedSlot(
            weight.values,
            (rows.full, columns.full),
            dtypes=_DTYPES[matrix.scheme.kind],
            index=(matrix.row_slice, matrix.column_slice),
            stands_for=rows.full * columns.full,
        ),
        f"{matrix.name}.{matrix.scheme.scale_name}": _scales(matrix),
    }
    if matrix.scheme.kind is Kind.INT8:
        found[f"{matrix.name}.weight_zero_point"] = EqualSlot(
            weight.values,
            (rows.full, 1),
            dtypes=("int8",),
            shapes=((1, 1),),
            holds=lambda zeros: not bool(zeros.any()),
            needed="zeros are needed",
        )
    if weight.input_scale is not None:
        found[f"{matrix.name}.input_scale"] = input_scale_slot(matrix)
    return found


def _scales(matrix: StoredMatrix) -> QuantizedSlot:
    """The scales, whatever shares them, for each output feature and group."""
    rows, size = matrix.rows.full, matrix.scheme.group_size
    if matrix.scheme.granularity is Granularity.TENSOR:
        return scales_slot(matrix, (), lambda scale: scale.view(1, 1).expand(1, matrix.rows.held), ((1,), (1, 1)))
    if matrix.scheme.granularity is Granularity.CHANNEL:
        return scales_slot(matrix, (rows, 1), lambda scales: scales.view(1, -1)[:, matrix.row_slice], ((rows,),))

    shape = (-(-rows // size), matrix.full_groups)

    def by_row(blocks: Tensor) -> Tensor:
        return blocks.float().view(shape)[:, matrix.groups].repeat_interleave(size, 0)[matrix.row_slice].t()

    return scales_slot(matrix, shape, by_row, ((shape[0], 1, shape[1], 1),), _BLOCK_SCALES)
