# SPDX-License-Identifier: Apache-2.0
"""compressed-tensors' pack-quantized: words along the input features, of numbers to which half their range is added."""

from __future__ import annotations

import torch
from torch import Tensor

from lightllm_backend.kernels.quantized.weight import INT4_ZERO, pack_int4
from lightllm_backend.models.quantization.matrix import StoredMatrix
from lightllm_backend.models.quantization.scheme import Kind
from lightllm_backend.models.quantization.slots import EqualSlot, OrderSlot, QuantizedSlot, scales_slot
from lightllm_backend.models.quantization.words import Words
from lightllm_backend.models.weights import WeightSlot

_PER_WORD = {Kind.INT4: 8, Kind.INT8: 4}


def slots(matrix: StoredMatrix) -> dict[str, WeightSlot]:
    """weight_packed [out, in * bits / 32] int32, weight_scale [out, groups], weight_shape [2], weight_g_idx [in];
    weight_zero_point [out * bits / 32, groups] int32, in words along the output features."""
    rows, columns, weight, kind = matrix.rows, matrix.columns, matrix.weight, matrix.scheme.kind
    words, zero_words = Words.of(columns, _PER_WORD[kind]), Words.of(rows, _PER_WORD[kind])
    name, groups = matrix.name, matrix.full_groups
    shape = [rows.full, columns.full]
    found: dict[str, WeightSlot] = {
        f"{name}.weight_packed": QuantizedSlot(
            weight.values,
            (rows.full, words.total),
            dtypes=("int32",),
            index=(matrix.row_slice, words.part),
            convert=lambda packed: _values(words.unpack(packed, 1), kind),
            stands_for=rows.full * columns.full,
        ),
        f"{name}.weight_scale": scales_slot(
            matrix, (rows.full, groups), lambda scales: scales[matrix.row_slice, matrix.groups].t()
        ),
        f"{name}.weight_shape": EqualSlot(
            weight.values,
            (2,),
            dtypes=("int64", "int32"),
            holds=lambda found: found.tolist() == shape,
            needed=f"the shape {shape} is needed",
        ),
    }
    if weight.zeros is not None:
        found[f"{name}.weight_zero_point"] = QuantizedSlot(
            weight.zeros,
            (zero_words.total, groups),
            dtypes=("int32",),
            index=(zero_words.part, matrix.groups),
            convert=lambda packed: _signed(zero_words.unpack(packed, 0), kind).t(),
            dummy=INT4_ZERO if kind is Kind.INT4 else 0,
        )
    if weight.order is not None:
        found[f"{name}.weight_g_idx"] = OrderSlot(weight.order, (columns.full,), matrix=matrix)
    return found


def _values(numbers: Tensor, kind: Kind) -> Tensor:
    return pack_int4(numbers) if kind is Kind.INT4 else _signed(numbers, kind)


def _signed(numbers: Tensor, kind: Kind) -> Tensor:
    """int8 numbers as they are meant; those of 4 bits stay without a sign, as QuantizedWeight has them."""
    return numbers if kind is Kind.INT4 else (numbers.to(torch.int16) - 128).to(torch.int8)
