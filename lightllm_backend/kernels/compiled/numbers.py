# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="call-arg, var-annotated"
"""Numbers in compiled kernels: float32 as it is, bfloat16 as its bits in uint16. And what they compute of numbers: an
exponential that vectorises, and the norm of a row.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
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
        return cast(_Function, njit(cache=True, fastmath=_FAST_MATH)(function))
    except RuntimeError:
        return cast(_Function, njit(fastmath=_FAST_MATH)(function))


def array(tensor: Tensor) -> NDArray[Any]:
    """The tensor's memory, with bfloat16 as uint16."""
    values = tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
    result: NDArray[Any] = values.numpy()
    return result


@intrinsic
def _float_of(context, bits):  # noqa: ARG001 - numba's signature
    return types.float32(types.uint32), lambda _, builder, __, values: builder.bitcast(values[0], ir.FloatType())


@intrinsic
def _bits_of(context, number):  # noqa: ARG001
    return types.uint32(types.float32), lambda _, builder, __, values: builder.bitcast(values[0], ir.IntType(32))


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
    return lambda number: _float_of(np.uint32(number) << np.uint32(16))


@overload(rounded, inline="always")
def _rounded(number, like):  # noqa: ARG001
    if like.dtype is types.float32:
        return lambda number, like: np.float32(number)

    def to_bfloat16(number, like):  # noqa: ARG001
        bits = _bits_of(np.float32(number))
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
    return series * _float_of(np.uint32(np.int32(whole) + np.int32(127)) << np.uint32(23))


@compiled
def normed(x, weight, eps, out):
    """A row to `out`, divided by its root mean square and rounded to the dtype of `weight`, times that."""
    total = np.float32(0.0)
    for i in range(x.shape[0]):
        total += load(x[i]) * load(x[i])
    factor = np.float32(1.0) / np.sqrt(total / np.float32(x.shape[0]) + np.float32(eps))
    for i in range(x.shape[0]):
        out[i] = rounded(load(rounded(load(x[i]) * factor, weight)) * load(weight[i]), out)
