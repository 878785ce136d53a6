# SPDX-License-Identifier: Apache-2.0
"""The slots of a quantised matrix's tensors: they take a checkpoint's tensor into the layout of QuantizedWeight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightllm_backend.kernels.quantized.weight import pack_int4, unpack_int4
from lightllm_backend.models.errors import ModelError
from lightllm_backend.models.quantization.matrix import UNKNOWN_ORDER, StoredMatrix
from lightllm_backend.models.quantization.scheme import Kind
from lightllm_backend.models.weight_files import FLOATS, Source
from lightllm_backend.models.weights import WeightSlot

# Standard deviation of dummy weights, as of others.
_DUMMY_STD = 0.02
# That of the values that dummy weights have before they are scaled: see QuantizedSlot.randomize.
_VALUES_STD = {Kind.INT4: 4.6, Kind.INT8: 73.0, Kind.FP8: 0.6}


def _unchanged(stored: Tensor) -> Tensor:
    return stored


@dataclass(frozen=True)
class QuantizedSlot(WeightSlot):
    """The slot of a tensor that is converted while it is read.

    `index` is what to read of the tensor.
    """

    index: tuple[slice, ...] = ()
    convert: Callable[[Tensor], Tensor] = _unchanged
    stands_for: int = 0  # weights of the model
    dummy: float | None = None  # dummy value; None: random bits

    @property
    def num_weights(self) -> int:
        return self.stands_for

    def fill(self, source: Source) -> None:
        read = source.read(self.index).to(self.target.device)
        values = self.convert(read).to(self.target.dtype)
        if self.target.dtype in (torch.float16, torch.float32) and not bool(torch.isfinite(values).all()):
            unlike = (
                "NaN or an infinite number" if not bool(torch.isfinite(read.float()).all()) else "a number too large"
            )
            raise ModelError(
                f"{source.path}: {source.name} holds {unlike}; finite numbers are needed in {self.target.dtype}"
            )
        self.take(values)

    def take(self, values: Tensor) -> None:
        """Store what the tensor was converted to."""
        self.target.copy_(values)

    def randomize(self, generator: torch.Generator) -> None:
        if self.dummy is not None:
            self.target.fill_(self.dummy)
        elif self.target.dtype == torch.float8_e4m3fn:
            # Any sign and fraction; without the exponent's highest bit there is no NaN, and at most 1.875.
            bits = torch.randint(256, self.target.shape, generator=generator, device=self.target.device)
            self.target.view(torch.uint8).copy_(bits & 0xBF)
        elif self.target.dtype == torch.int8:
            self.target.random_(-127, 128, generator=generator)
        else:
            self.target.random_(-(2**31), 2**31, generator=generator)


class LargestSlot(QuantizedSlot):
    """The slot of a number above 0 of which fused matrices share the largest."""

    def fill(self, source: Source) -> None:
        super().fill(source)
        number = source.read(()).float()
        if not bool((number > 0).all()):
            raise ModelError(f"{source.path}: {source.name} is {number.item():g}; a finite number above 0 is needed")

    def take(self, values: Tensor) -> None:
        self.target.copy_(torch.maximum(self.target, values))


@dataclass(frozen=True)
class EqualSlot(WeightSlot):
    """The slot of a tensor that need not be there, and must be what config.json lets expect."""

    dtypes: Sequence[str] = ("int32",)
    holds: Callable[[Tensor], bool] = bool
    needed: str = ""
    is_optional = True

    @property
    def num_weights(self) -> int:
        return 0

    @property
    def nbytes(self) -> int:
        return 0

    def fill(self, source: Source) -> None:
        if not self.holds(source.read(())):
            raise ModelError(f"{source.path}: {source.name} contradicts config.json; {self.needed}")

    def randomize(self, generator: torch.Generator) -> None:
        pass


@dataclass(frozen=True)
class OrderSlot(WeightSlot):
    """The slot of g_idx [in_features], the group of each input feature, by which the columns are sorted in the end."""

    dtypes: Sequence[str] = ("int32", "int64")
    matrix: StoredMatrix | None = None
    found: list[Tensor] = field(default_factory=list, compare=False)

    @property
    def num_weights(self) -> int:
        return 0

    def fill(self, source: Source) -> None:
        assert self.matrix is not None
        groups = source.read(()).long()
        columns = torch.arange(len(groups))
        order = groups.argsort(stable=True)
        if not torch.equal(groups[order], columns // self.matrix.full_group_size):
            raise ModelError(
                f"{source.path}: {source.name} does not give each of {self.matrix.full_groups} groups "
                f"{self.matrix.full_group_size} input features; groups of that size are needed"
            )
        self.found.append(order.to(torch.int32))

    def finish(self) -> None:
        assert self.matrix is not None
        weight, order = self.matrix.weight, self.found.pop().to(self.target.device)
        if int(self.target[0]) == UNKNOWN_ORDER:
            self.target.copy_(order)
        elif not torch.equal(self.target, order):
            raise ModelError(
                f"{self.matrix.path}{self.matrix.name}.g_idx differs from that of a matrix that is multiplied by the "
                "same input; the same order is needed"
            )
        values = unpack_int4(weight.values) if weight.is_int4 else weight.values
        values = values.index_select(1, order)
        weight.values.copy_(pack_int4(values) if weight.is_int4 else values)

    def randomize(self, generator: torch.Generator) -> None:  # noqa: ARG002 - columns that are in order
        self.target.copy_(torch.arange(len(self.target)))


def scales_slot(
    matrix: StoredMatrix,
    full_shape: tuple[int, ...],
    convert: Callable[[Tensor], Tensor],
    shapes: tuple[tuple[int, ...], ...] = (),
    dtypes: Sequence[str] = FLOATS,
) -> QuantizedSlot:
    """The slot of a tensor of scales, which is read whole."""
    dummy = _DUMMY_STD / _VALUES_STD[matrix.scheme.kind]
    return QuantizedSlot(matrix.weight.scales, full_shape, convert=convert, shapes=shapes, dtypes=dtypes, dummy=dummy)


def input_scale_slot(matrix: StoredMatrix) -> QuantizedSlot:
    """The slot of the scale that all activations have."""
    assert matrix.weight.input_scale is not None
    return LargestSlot(matrix.weight.input_scale, (), convert=lambda scale: scale.view(1), shapes=((1,),), dummy=0.02)
