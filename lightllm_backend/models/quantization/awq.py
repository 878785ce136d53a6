# SPDX-License-Identifier: Apache-2.0
"""AutoAWQ's format `gemm`: words along the output features, with every second feature first."""

from __future__ import annotations

import torch
from torch import Tensor

from lightllm_backend.kernels.quantized.weight import INT4_ZERO, pack_int4
from lightllm_backend.models.errors import ModelError
from lightllm_backend.models.quantization.matrix import StoredMatrix
from lightllm_backend.models.quantization.slots import EqualSlot, QuantizedSlot, scales_slot
from lightllm_backend.models.quantization.words import Words
from lightllm_backend.models.weights import WeightSlot

# The place of each feature in a word: the words hold the features 0, 2, 4, 6, 1, 3, 5, 7.
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


def slots(matrix: StoredMatrix) -> dict[str, WeightSlot]:
    """qweight [in, out / 8] int32, qzeros [groups, out / 8] int32, scales [groups, out]."""
    rows, columns, weight = matrix.rows, matrix.columns, matrix.weight
    if rows.full % 8 != 0:
        raise ModelError(f"{matrix.path}{matrix.name} has {rows.full} output features; AWQ needs a multiple of 8")
    words = Words.of(rows, 8)
    name, groups = matrix.name, matrix.full_groups
    found: dict[str, WeightSlot] = {
        f"{name}.qweight": QuantizedSlot(
            weight.values,
            (columns.full, words.total),
            dtypes=("int32",),
            index=(matrix.column_slice, words.part),
            convert=lambda packed: pack_int4(words.unpack(packed, 1, _PLACES).t()),
            stands_for=rows.full * columns.full,
        ),
        f"{name}.scales": scales_slot(
            matrix, (groups, rows.full), lambda scales: scales[matrix.groups, matrix.row_slice]
        ),
    }
    if weight.zeros is not None:
        found[f"{name}.qzeros"] = QuantizedSlot(
            weight.zeros,
            (groups, words.total),
            dtypes=("int32",),
            index=(matrix.groups, words.part),
            convert=lambda packed: words.unpack(packed, 1, _PLACES),
            dummy=INT4_ZERO,
        )
    else:
        found[f"{name}.qzeros"] = EqualSlot(
            weight.values, (groups, words.total), holds=_are_eights, needed="zero_point is false, so all must be 8"
        )
    return found


def _are_eights(packed: Tensor) -> bool:
    return bool((packed == torch.tensor(0x88888888).to(torch.int32)).all())
