# SPDX-License-Identifier: Apache-2.0
"""GPTQ's formats: words along the input features; in `gptq` zero points are stored less 1, in `gptq_v2` as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from lightllm_backend.kernels.quantized.weight import INT4_ZERO, pack_int4
from lightllm_backend.models.quantization.matrix import Span, StoredMatrix
from lightllm_backend.models.quantization.scheme import Kind, Storage
from lightllm_backend.models.quantization.slots import EqualSlot, OrderSlot, QuantizedSlot, scales_slot
from lightllm_backend.models.quantization.words import Words
from lightllm_backend.models.weight_files import FLOATS
from lightllm_backend.models.weights import WeightSlot

_PER_WORD = {Kind.INT4: 8, Kind.INT8: 4}
# 1 in each number of a word. Zero points are added to as words: GPTQModel takes 1 from each so, and a zero point of 0
# borrows from its neighbour.
_ONES = {Kind.INT4: 0x11111111, Kind.INT8: 0x01010101}
_SIGN = 128  # what int8 values and zero points are stored more by


def slots(matrix: StoredMatrix) -> dict[str, WeightSlot]:
    """qweight [in * bits / 32, out] int32, qzeros [groups, out * bits / 32] int32, scales [groups, out], g_idx [in].

    A bias of zeros may be there too: AutoGPTQ wrote one for each layer.
    """
    rows, columns, weight, kind = matrix.rows, matrix.columns, matrix.weight, matrix.scheme.kind
    words, zero_words = Words.of(columns, _PER_WORD[kind]), Words.of(rows, _PER_WORD[kind])
    name, groups = matrix.name, matrix.full_groups
    found: dict[str, WeightSlot] = {
        f"{name}.qweight": QuantizedSlot(
            weight.values,
            (words.total, rows.full),
            dtypes=("int32",),
            index=(words.part, matrix.row_slice),
            convert=lambda packed: _values(words.unpack(packed, 0).t(), kind),
            stands_for=rows.full * columns.full,
        ),
        f"{name}.scales": scales_slot(
            matrix, (groups, rows.full), lambda scales: scales[matrix.groups, matrix.row_slice]
        ),
        f"{name}.bias": EqualSlot(
            weight.values,
            (rows.full,),
            dtypes=FLOATS,
            holds=_are_none,
            needed="the layer has no bias: zeros are needed",
        ),
    }
    zeros_shape = (groups, zero_words.total)
    if weight.zeros is not None:
        found[f"{name}.qzeros"] = QuantizedSlot(
            weight.zeros,
            zeros_shape,
            dtypes=("int32",),
            index=(matrix.groups, zero_words.part),
            convert=lambda packed: _zeros(packed, matrix, zero_words),
            dummy=INT4_ZERO if kind is Kind.INT4 else 0,
        )
    else:
        middle = INT4_ZERO if kind is Kind.INT4 else _SIGN
        all_words = Words.of(Span(rows.full, 0, rows.full), _PER_WORD[kind])
        found[f"{name}.qzeros"] = EqualSlot(
            weight.values,
            zeros_shape,
            holds=lambda packed: bool((all_words.unpack(_added(packed, matrix), 1) == middle).all()),
            needed=f"sym is true, so all zero points of {matrix.scheme.storage.value} must be {middle}",
        )
    if weight.order is not None:
        found[f"{name}.g_idx"] = OrderSlot(weight.order, (columns.full,), matrix=matrix)
    else:
        size = matrix.full_group_size
        found[f"{name}.g_idx"] = EqualSlot(
            weight.values,
            (columns.full,),
            holds=lambda found: torch.equal(found.long(), torch.arange(columns.full) // size),
            needed=f"desc_act is false, so groups of {size} must follow each other",
        )
    return found


def _values(numbers: Tensor, kind: Kind) -> Tensor:
    return pack_int4(numbers) if kind is Kind.INT4 else (numbers.to(torch.int16) - _SIGN).to(torch.int8)


def _added(packed: Tensor, matrix: StoredMatrix) -> Tensor:
    """The words of zero points, with 1 added to each in `gptq`."""
    return packed + _ONES[matrix.scheme.kind] if matrix.scheme.storage is Storage.GPTQ else packed


def _zeros(packed: Tensor, matrix: StoredMatrix, words: Words) -> Tensor:
    zeros = words.unpack(_added(packed, matrix), 1)
    return zeros if matrix.scheme.kind is Kind.INT4 else (zeros.to(torch.int16) - _SIGN).to(torch.int8)


def _are_none(values: Tensor) -> bool:
    return not bool(values.any())
