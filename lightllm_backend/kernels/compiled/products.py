# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-calls
# mypy: disable-error-code="call-arg"
"""Products with a GridWeight: activations are rounded to 8 bits, and integers multiplied."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lightllm_backend.kernels import reference
from lightllm_backend.kernels.activation.reference import gelu_tanh
from lightllm_backend.kernels.compiled.dot_product import multiply_block
from lightllm_backend.kernels.compiled.numbers import (
    DTYPES,
    LIKE,
    bits_of,
    compiled,
    exp,
    float_of,
    lasting_array,
    load,
    matrix,
    rounded,
)
from lightllm_backend.kernels.compiled.rows import gelu_argument, silu_and_mul
from lightllm_backend.kernels.compiled.threads import in_parts
from lightllm_backend.kernels.quantized.grid_weight import BLOCK, GROUP, GridWeight
from lightllm_backend.kernels.quantized.rounded_tokens import Activations
from lightllm_backend.kernels.quantized.weight import Weight

# Tokens that share what is read and unpacked of a weight.
_TOKENS = 4
# Multiply-adds that several threads share. A single token takes as long as two, by the time that weights take to come.
_MANY_PRODUCTS = 1 << 25


@compiled
def _quantize(x: NDArray[Any], values: NDArray[np.int8], scales: NDArray[np.float32]) -> None:
    """One token's features: int8 values, and for each group its scale, and the scale times the sum of its values."""
    for group in range(scales.shape[0]):
        first = group * GROUP
        # Magnitudes are in the order of their bits, with NaN above all.
        bits = np.uint32(0)
        for i in range(first, first + GROUP):
            bits = max(bits, bits_of(load(x[i])) & np.uint32(0x7FFFFFFF))
        scale = float_of(bits) / np.float32(127.0)
        factor = np.float32(1.0) / max(scale, np.float32(1e-30))
        whole = np.int32(0)
        for i in range(first, first + GROUP):
            value = np.int32(np.rint(load(x[i]) * factor))
            values[i] = value
            whole += value
        scales[group, 0] = scale
        scales[group, 1] = scale * np.float32(whole)


@compiled
def _multiply_block(block: Any, bits: int, values: Any, scales: Any, token: int, width: int, out: Any) -> None:
    groups = scales.shape[1]
    of_values = values.ctypes.data + token * GROUP * groups
    of_scales = scales.ctypes.data + token * 8 * groups
    if bits == 4:
        if width == 1:
            multiply_block(block.ctypes.data, groups, of_values, of_scales, out.ctypes.data, 4, 1)
        else:
            multiply_block(block.ctypes.data, groups, of_values, of_scales, out.ctypes.data, 4, _TOKENS)
    elif width == 1:
        multiply_block(block.ctypes.data, groups, of_values, of_scales, out.ctypes.data, 8, 1)
    else:
        multiply_block(block.ctypes.data, groups, of_values, of_scales, out.ctypes.data, 8, _TOKENS)


@compiled
def _multiply(
    of_x: int,
    of_out: int,
    tokens: int,
    packed: Any,
    bits: int,
    bias: Any,
    gated: bool,
    is_gelu: bool,
    first: int,
    last: int,
) -> None:
    """The blocks from `first` to before `last` of the product. `bias` has the type of `x` and `out`."""
    features = packed.shape[0] * BLOCK // (1 + gated)
    x = matrix(of_x, tokens, packed.shape[1] * GROUP, bias)
    out = matrix(of_out, tokens, features, bias)
    width = 1 if tokens == 1 else _TOKENS
    padded = -(-tokens // width) * width
    values = np.zeros((padded, x.shape[1]), np.int8)
    scales = np.zeros((padded, x.shape[1] // GROUP, 2), np.float32)
    for token in range(tokens):
        _quantize(x[token], values[token], scales[token])
    sums = np.empty((2, _TOKENS, BLOCK), np.float32)  # of the gate's block and of the up projection's
    for block in range(first, last):
        for start in range(0, tokens, width):
            for part in range(1 + gated):
                which = block + part * features // BLOCK
                _multiply_block(packed[which], bits, values, scales, start, width, sums[part])
                if len(bias) > 0:
                    for token in range(width):
                        for i in range(BLOCK):
                            sums[part, token, i] += load(bias[which * BLOCK + i])
            for token in range(start, min(start + width, tokens)):
                for i in range(BLOCK):
                    number = sums[0, token - start, i]
                    if gated:
                        argument = gelu_argument(number) if is_gelu else number
                        number = number / (np.float32(1.0) + exp(-argument)) * sums[1, token - start, i]
                    out[token, block * BLOCK + i] = rounded(number, bias)


def _is_compiled(x: Tensor, weight: Weight) -> bool:
    return isinstance(weight, GridWeight) and weight.takes(x) and x.dtype in DTYPES


def _product(
    x: Tensor, weight: GridWeight, bias: Tensor | None, out: Tensor, gated: bool = False, is_gelu: bool = False
) -> Tensor:
    rows, columns = weight.shape
    added = LIKE[x.dtype] if bias is None else lasting_array(bias)
    x = x.contiguous()
    arguments = x.data_ptr(), out.data_ptr(), x.shape[0], weight.array, weight.bits, added, gated, is_gelu
    in_parts(_multiply, arguments, rows // BLOCK // (1 + gated), rows * columns * max(2, x.shape[0]) >= _MANY_PRODUCTS)
    return out


def linear(
    x: Activations, weight: Weight, bias: Tensor | None = None, out: Tensor | None = None, is_gelu: bool = False
) -> Tensor:
    if not isinstance(x, Tensor) or not _is_compiled(x, weight):
        return reference.linear(x, weight, bias, out, is_gelu)
    assert isinstance(weight, GridWeight)
    out = x.new_empty((x.shape[0], weight.shape[0])) if out is None else out
    product = _product(x, weight, bias, out)
    return gelu_tanh(product) if is_gelu else product


def linear_splits(x: Activations, weight: Weight, bias: Tensor | None = None) -> Tensor:
    return linear(x, weight, bias).unsqueeze(0)


def gated_linear(
    x: Activations,
    weight: Weight,
    bias: Tensor | None = None,
    is_gelu: bool = False,
    reader: Weight | None = None,  # noqa: ARG001 - products round what they read
) -> Activations:
    if not isinstance(x, Tensor) or not _is_compiled(x, weight):
        return silu_and_mul(reference.linear(x, weight, bias), is_gelu)
    assert isinstance(weight, GridWeight)
    return _product(x, weight, bias, x.new_empty((x.shape[0], weight.shape[0] // 2)), True, is_gelu)
