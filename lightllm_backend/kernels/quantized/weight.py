# SPDX-License-Identifier: Apache-2.0
"""QuantizedWeight: a matrix of 4 or 8 bits per weight, whatever checkpoint it comes from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from lightllm_backend.kernels.quantized.grid_weight import GROUP, GridWeight, OnGrid, can_pack, make_grid

# The largest magnitudes of 8-bit numbers; -128 is not used, so that the range is symmetric.
LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
# The least scale of activations, so that none is divided by zero.
MIN_INPUT_SCALE = 1e-12
# Subtracted from int4 values, which are unsigned, if the weight has no zero points.
INT4_ZERO = 8


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight [out_features, in_features]: (values[o, i] - zeros[g, o]) * scales[g, o] with g = i // group_size.

    `values` is int8 or float8_e4m3fn [out_features, in_features], or int32 [out_features, in_features / 8] with eight
    4-bit values from 0 to 15 in each word, the first in the lowest bits. Without `zeros`, 4-bit values have the zero
    point 8 and others 0. The last group may be smaller. Column j is multiplied by input feature `order[j]`, or by j.

    That is its layout while it is filled. In fragments, its columns are then in the order of fragments.py, which is
    internal to the kernels: products, `dequantize` and `order` mean the same weight.

    If `quantizes_input`, the checkpoint wants the input in 8 bits as well, of the values' dtype: with one scale,
    `input_scale`, or else with a scale for each token and group.
    """

    values: Tensor
    scales: Tensor  # [groups, out_features] float32 or float16
    group_size: int
    zeros: Tensor | None = None  # [groups, out_features] int8
    order: Tensor | None = None  # [in_features] int32
    quantizes_input: bool = False
    input_scale: Tensor | None = None  # [1] float32
    in_fragments: bool = False

    @property
    def is_int4(self) -> bool:
        return self.values.dtype == torch.int32

    @property
    def shape(self) -> tuple[int, int]:
        """[out_features, in_features]."""
        out_features, columns = self.values.shape
        return out_features, columns * (8 if self.is_int4 else 1)

    @property
    def num_groups(self) -> int:
        return self.scales.shape[0]

    def rows(self, rows: slice) -> QuantizedWeight:
        """A view of some of the output features."""
        zeros = None if self.zeros is None else self.zeros[:, rows]
        return replace(self, values=self.values[rows], scales=self.scales[:, rows], zeros=zeros)

    def order_input(self, x: Tensor) -> Tensor:
        """The input [tokens, in_features] in the order of the weight's columns."""
        return x if self.order is None else x.index_select(1, self.order)

    def on_grid(self) -> GridWeight | None:
        """The weight for the kernels that are compiled for a CPU, or None if they cannot multiply by it.

        They multiply by scales of float16, and take no columns in an order of their own.
        """
        columns = self.shape[1]
        has_grid = self.order is None and self.values.dtype != torch.float8_e4m3fn
        has_whole_groups = self.group_size >= columns or self.group_size % GROUP == 0
        if not has_grid or not has_whole_groups or not can_pack(self.shape, self.values.device):
            return None
        exact, scales = self.scales.float(), self.scales.half()
        # float16's numbers are farther apart than the first below 2**-14, which matters beside such scales alone.
        if not torch.isclose(scales.float(), exact, 2.0**-10, 2.0**-12 * float(exact.abs().mean())).all():
            return None
        groups = torch.arange(0, columns, GROUP) // self.group_size
        zeros = torch.full_like(scales, INT4_ZERO if self.is_int4 else 0) if self.zeros is None else self.zeros
        least = -scales.float() * (zeros.float() + (0 if self.is_int4 else 128))

        def rows_on_grid(rows: slice) -> OnGrid:
            values = self.values[rows]
            numbers = unpack_int4(values) if self.is_int4 else values.view(torch.uint8) ^ 128  # from -128 on
            return numbers, scales[groups, rows].t(), least[groups, rows].t().half()

        return make_grid(self.shape, 4 if self.is_int4 else 8, rows_on_grid)

    def tensors(self) -> Iterator[Tensor]:
        """All tensors of the weight."""
        values = (getattr(self, field.name) for field in fields(self))
        return (value for value in values if isinstance(value, Tensor))


# What the products multiply by; a GridWeight is for a CPU.
Weight = Tensor | QuantizedWeight | GridWeight


def pack_int4(values: Tensor) -> Tensor:
    """Pack numbers from 0 to 15 [..., columns] into int32 [..., columns / 8], the first of eight in the lowest bits."""
    values = values.to(torch.uint8)
    pairs = values[..., 0::2] | values[..., 1::2] << 4
    return pairs.contiguous().view(torch.int32)


def unpack_int4(words: Tensor) -> Tensor:
    """Undo pack_int4: int32 [..., words] to uint8 [..., 8 * words]."""
    pairs = words.contiguous().view(torch.uint8)
    return torch.stack((pairs & 15, pairs >> 4), -1).flatten(-2)
