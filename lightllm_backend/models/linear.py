# SPDX-License-Identifier: Apache-2.0
"""The linear layers that models are made of, each with this rank's part of the weight, quantised or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from lightllm_backend.kernels.quantized.grid_weight import GridWeight, with_grid
from lightllm_backend.kernels.quantized.rounded_tokens import Activations
from lightllm_backend.kernels.quantized.weight import QuantizedWeight, Weight
from lightllm_backend.models.errors import ModelError
from lightllm_backend.models.placement import Placement
from lightllm_backend.models.quantization.matrix import Span, StoredMatrix, empty_weight
from lightllm_backend.models.quantization.readers import matrix_slots
from lightllm_backend.models.weights import WeightSlot, join_slots


@dataclass(frozen=True)
class Part:
    """Rows of a checkpoint's matrix within a fused one. This rank holds `rows` of its `full_rows`, from `start` on."""

    name: str
    full_rows: int
    rows: int
    start: int


def fused_parts(name: str, parts: Sequence[Part]) -> list[Part]:
    """The parts as a checkpoint has them whose matrix `name` holds all of them, one below the other."""
    full_rows = sum(part.full_rows for part in parts)
    firsts = accumulate((part.full_rows for part in parts), initial=0)
    return [Part(name, full_rows, part.rows, first + part.start) for part, first in zip(parts, firsts, strict=False)]


class LinearWeight:
    """This rank's part of a weight, which is one or several matrices of the checkpoint, quantised or not."""

    def __init__(self, parts: Sequence[Part], columns: Span, place: Placement, rows: int | None = None) -> None:
        """`rows` is the number of the weight's rows, by default those of the parts; further ones are padding."""
        schemes = {part.name: place.scheme(part.name) for part in parts}
        self._parts, self._columns, self._path = parts, columns, place.path
        self._scheme = schemes[parts[0].name]
        for name, scheme in schemes.items():
            if scheme != self._scheme:
                reason = place.left_out_by(name) or place.left_out_by(parts[0].name)
                raise ModelError(
                    f"{place.path}{name} and {parts[0].name} are quantised differently{reason and f' ({reason})'}; "
                    "the same scheme is needed for matrices that are multiplied together"
                )
        self._rows = sum(part.rows for part in parts) if rows is None else rows
        self._dtype = place.dtype
        self.value: Weight
        if self._scheme is None:
            self.value = place.empty(self._rows, columns.held)
        else:
            self.value = self._empty(place.device)
        self._kernels, self._finds_grids = place.kernels, place.quantization.finds_grids
        place.weights.append(self)

    def _empty(self, device: torch.device) -> QuantizedWeight:
        assert self._scheme is not None
        name = self._path + self._parts[0].name
        return empty_weight(self._scheme, name, self._rows, self._columns, self._dtype, device)

    def arrange(self) -> None:
        """Bring a filled weight into the order that the kernels read best; its slots tell but sizes from then on."""
        if isinstance(self.value, QuantizedWeight):
            grid = self.value.on_grid() if self._finds_grids else None
            self.value = self._kernels.arrange_weight(self.value) if grid is None else grid
        elif isinstance(self.value, Tensor) and self._finds_grids:
            self.value = with_grid(self.value)

    def weight_map(self) -> dict[str, WeightSlot]:
        slots: list[dict[str, WeightSlot]] = []
        stored = self.value
        if isinstance(stored, GridWeight) and self._scheme is not None:
            stored = self._empty(torch.device("meta"))
        elif isinstance(stored, GridWeight):
            assert stored.floats is not None
            stored = stored.floats
        first = 0
        for part in self._parts:
            rows = slice(first, first + part.rows)
            first += part.rows
            if isinstance(stored, Tensor):
                dim, start = (0, part.start) if self._columns.is_whole else (1, self._columns.start)
                shape = (part.full_rows, self._columns.full)
                slots.append({f"{part.name}.weight": WeightSlot(stored[rows], shape, dim, start)})
            else:
                assert self._scheme is not None
                span = Span(part.full_rows, part.start, part.rows)
                weight = stored.rows(rows)
                matrix = StoredMatrix(part.name, self._path, span, self._columns, self._scheme, weight)
                slots.append(matrix_slots(matrix))
        return join_slots(slots)


class ColumnLinear:
    """Several matrices of the checkpoint fused into one, each split over the ranks by its output features."""

    def __init__(self, parts: Sequence[Part], in_features: int, bias: bool, place: Placement) -> None:
        self.parts = parts
        self._weight = LinearWeight(parts, Span(in_features, 0, in_features), place)
        self.bias = place.empty(self.weight.shape[0]) if bias else None
        self.kernels = place.kernels

    @property
    def weight(self) -> Weight:
        return self._weight.value

    def __call__(self, x: Activations) -> Tensor:
        return self.kernels.linear(x, self.weight, self.bias)

    def gelu(self, x: Activations) -> Tensor:
        return self.kernels.linear(x, self.weight, self.bias, is_gelu=True)

    def gated(self, x: Activations, is_gelu: bool, reader: Weight) -> Activations:
        """silu(first(x)) * second(x), or gelu(first(x)) * second(x), for two matrices of the same shape.

        The product with `reader` alone reads it.
        """
        return self.kernels.gated_linear(x, self.weight, self.bias, is_gelu, reader)

    def weight_map(self) -> dict[str, WeightSlot]:
        weights = self._weight.weight_map()
        if self.bias is None:
            return weights
        biases = torch.split(self.bias, [part.rows for part in self.parts])
        slots = [
            {f"{part.name}.bias": WeightSlot(bias, (part.full_rows,), 0, part.start)}
            for part, bias in zip(self.parts, biases, strict=True)
        ]
        return weights | join_slots(slots)


class RowLinear:
    """A matrix split over the ranks by its input features.

    A call sums the ranks' products; `unsummed` leaves the sum to the norm that follows. The result may be [parts,
    tokens, out_features], whose sum the norm takes (see Kernels.linear_splits).
    """

    def __init__(self, name: str, in_features: int, out_features: int, bias: bool, place: Placement) -> None:
        self.name = name
        self.kernels = place.kernels
        self.parallel = place.parallel
        share = place.share(f"{name}'s number of inputs", in_features)
        columns = Span(in_features, share * place.parallel.rank, share)
        self._weight = LinearWeight([Part(name, out_features, out_features, 0)], columns, place)
        self.bias = place.empty(out_features) if bias else None

    @property
    def weight(self) -> Weight:
        return self._weight.value

    def __call__(self, x: Activations) -> Tensor:
        return self._parts(x) if self.parallel.size == 1 else self.parallel.all_reduce(self._whole(x))

    def unsummed(self, x: Activations) -> Tensor:
        """This rank's product, for a norm that sums it over the ranks; in parts if it goes through Lamport buffers."""
        buffers = self.parallel.lamport_buffers(x.shape[0], self.weight.shape[0])
        return self._parts(x) if self.parallel.size == 1 or buffers else self._whole(x)

    def _parts(self, x: Activations) -> Tensor:
        return self.kernels.linear_splits(x, self.weight, self._added_bias)

    def _whole(self, x: Activations) -> Tensor:
        buffer = self.parallel.product_buffer(x.shape[0], self.weight.shape[0], x.dtype)
        return self.kernels.linear(x, self.weight, self._added_bias, buffer)

    @property
    def _added_bias(self) -> Tensor | None:
        """The bias on rank 0, which alone adds it. All ranks hold it."""
        return self.bias if self.parallel.rank == 0 else None

    def weight_map(self) -> dict[str, WeightSlot]:
        slots = self._weight.weight_map()
        if self.bias is not None:
            slots[f"{self.name}.bias"] = WeightSlot.whole(self.bias)
        return slots
