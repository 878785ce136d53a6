# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="attr-defined, call-arg, var-annotated"
"""Numbers in compiled kernels: float32 as it is, bfloat16 as its bits in uint16. And what they compute of numbers: an
exponential that vectorises, and the norm of a row.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
import torch
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic, overload
from numpy.typing import NDArray
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16)

_Function = TypeVar("_Function", bound=Callable[..., Any])

# Sums may be taken in any order; NaN and infinity keep their meaning.
_FAST_MATH = {"arcp", "contract", "nsz", "reassoc"}


def compiled(function: _Function) -> _Function:
    """Compile at the first call, and keep the result for later processes if any directory for it can be written."""
    try:
        return cast(_Function, njit(cache=True, nogil=True, fastmath=_FAST_MATH)(function))
    except RuntimeError:
        return cast(_Function, njit(nogil=True, fastmath=_FAST_MATH)(function))


def array(tensor: Tensor) -> NDArray[Any]:
    """The tensor's memory, with bfloat16 as uint16. Kernels take activations by address, which is quicker."""
    values = tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
    result: NDArray[Any] = values.numpy()
    return result


# By dtype, an array of none: kernels that take addresses learn the type from it.
LIKE = {dtype: array(torch.empty(0, dtype=dtype)) for dtype in DTYPES}


def lasting_array(tensor: Tensor) -> NDArray[Any]:
    """`array` of a tensor that lives as long as the engine, made once: that takes as long as a small loop."""
    kept: NDArray[Any] | None = getattr(tensor, "kept_array", None)
    if kept is None:
        kept = array(tensor)
        tensor.kept_array = kept
    return kept


@intrinsic
def float_of(context, bits):  # noqa: ARG001 - numba's signature
    return types.float32(types.uint32), lambda _, builder, __, values: builder.bitcast(values[0], ir.FloatType())


@intrinsic
def bits_of(context, number):  # noqa: ARG001
    return types.uint32(types.float32), lambda _, builder, __, values: builder.bitcast(values[0], ir.IntType(32))


@intrinsic
def _pointer(context, address, like):  # noqa: ARG001
    def generate(context, builder, signature, values):
        return builder.inttoptr(values[0], context.get_value_type(signature.return_type))

    return types.CPointer(like.dtype)(address, like), generate


@compiled
def row(array, i, j):
    """array[i, j] of a three-dimensional array whose last dimension is contiguous, though its type need not say so."""
    return vector(array.ctypes.data + i * array.strides[0] + j * array.strides[1], array.shape[2], array)


@compiled
def vector(address, count, like):
    """The elements at an address, which are of the type of those of `like`."""
    return carray(_pointer(address, like), count)


@compiled
def matrix(address, rows, columns, like):
    """The same, [rows, columns]."""
    return carray(_pointer(address, like), (rows, columns))


def load(number):
    """An element of an array as float32."""
    raise NotImplementedError("for compiled kernels")


def rounded(number, like):
    """A float32 as an element of the array `like`, rounded to nearest, ties to even. It must not be NaN."""
    raise NotImplementedError("for compiled kernels")


@overload(load, inline="always")
def _load(number):
    if number is types.float32:
        return lambda number: number
    return lambda number: float_of(np.uint32(number) << np.uint32(16))


@overload(rounded, inline="always")
def _rounded(number, like):  # noqa: ARG001
    if like.dtype is types.float32:
        return lambda number, like: np.float32(number)

    def to_bfloat16(number, like):  # noqa: ARG001
        bits = bits_of(np.float32(number))
        return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))

    return to_bfloat16


@compiled
def exp(x):
    """e to the power of a float32, to the last bits, and 0 far below 0: as 2^n times a Taylor series of 2^f."""
    power = min(max(x * np.float32(1.4426950408889634), np.float32(-126.0)), np.float32(127.0))
    whole = np.floor(power + np.float32(0.5))
    f = (power - whole) * np.float32(0.6931471805599453)
    series = np.float32(1 / 720)
    series = series * f + np.float32(1 / 120)
    series = series * f + np.float32(1 / 24)
    series = series * f + np.float32(1 / 6)
    series = series * f + np.float32(0.5)
    series = series * f + np.float32(1.0)
    series = series * f + np.float32(1.0)
    return series * float_of(np.uint32(np.int32(whole) + np.int32(127)) << np.uint32(23))


@compiled
def normed(x, weight, eps, out):
    """A row to `out`, divided by its root mean square and rounded to the dtype of `weight`, times that."""
    total = np.float32(0.0)
    for i in range(x.shape[0]):
        total += load(x[i]) * load(x[i])
    factor = np.float32(1.0) / np.sqrt(total / np.float32(x.shape[0]) + np.float32(eps))
    for i in range(x.shape[0]):
        out[i] = rounded(load(rounded(load(x[i]) * factor, weight)) * load(weight[i]), out)
