# SPDX-License-Identifier: Apache-2.0
"""GridWeight: a weight of floats that 4 or 8 bits express, multiplied in so many bits where that is quicker on a CPU.

Weights that were dequantised from a GGUF file lie on a grid: in each group of 32 input features they are equally spaced
numbers. Reading those from memory takes a quarter of the bytes or half, and for few tokens little else counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

# PyTorch's kernels have no public names, so a release may lack them.
_pack: Any = getattr(torch, "_convert_weight_to_int4pack_for_cpu", None)
_product: Any = getattr(torch, "_weight_int4pack_mm_for_cpu", None)
# Input features of a group, as GGUF has them.
_GROUP = 32
# The kernel's blocks of output features are of 64 at the most.
_BLOCK = 64
# A weight and the greatest of its group, each rounded to bfloat16, by whose ratio we judge.
_ROUNDING = 2.0**-7
# The most tokens for which a product with one 4-bit matrix is quicker than with the floats.
_FEW_TOKENS = 16
# Numbers that are looked at at once: 2 MiB of float32, which a cache holds.
_CHUNK = 1 << 19


@dataclass(frozen=True)
class GridWeight:
    """A weight [out_features, in_features], and the same on its grid.

    8 bits are two matrices of 4 bits side by side, of the higher and of the lower halves: the input is doubled.
    """

    floats: Tensor
    packed: Tensor  # 4-bit values [out_features, halves * in_features / 2], as PyTorch's kernel wants them
    scales_and_zeros: Tensor  # [halves * groups, out_features, 2] bfloat16: a weight is (value - 8) * scale + zero
    halves: int

    @property
    def shape(self) -> torch.Size:
        return self.floats.shape

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The product with `x` [tokens, in_features], whose activations are rounded to bfloat16 for few tokens."""
        if len(x) * self.halves**2 > _FEW_TOKENS:
            return functional.linear(x, self.floats, bias)
        activations = x.to(torch.bfloat16)
        if self.halves == 2:
            activations = torch.cat((activations, activations), 1)
        product: Tensor = _product(activations, self.packed, _GROUP, self.scales_and_zeros).to(x.dtype)
        return product if bias is None else product.add_(bias)


def with_grid(floats: Tensor) -> Tensor | GridWeight:
    """The weight [out_features, in_features] with its grid, or alone if it has none or this CPU no kernel for it."""
    rows, columns = floats.shape
    if rows % _BLOCK != 0 or columns % _GROUP != 0 or not has_kernel(floats.device):
        return floats
    for halves, grid_of in ((1, _grid_of_4_bits), (2, _grid_of_8_bits)):
        if grid_of(floats[:_BLOCK]) is None:
            continue
        packed, scales_and_zeros = [], []
        step = max(_BLOCK, _CHUNK // columns // _BLOCK * _BLOCK)
        for first in range(0, rows, step):
            if (grid := grid_of(floats[first : first + step])) is None:
                return floats
            packed.append(_pack(grid[0], 1))
            scales_and_zeros.append(grid[1])
        return GridWeight(floats, torch.cat(packed), torch.cat(scales_and_zeros, 1), halves)
    return floats


def has_kernel(device: torch.device) -> bool:
    """Whether PyTorch has a vectorised product with 4 bits for this CPU."""
    return (
        device.type == "cpu"
        and None not in (_pack, _product)
        and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    )


def _grid_of_4_bits(floats: Tensor) -> tuple[Tensor, Tensor] | None:
    """Values 0 to 15 [rows, columns] int32, and scales_and_zeros; None if the weights lie on no grid of 16 numbers.

    The least and the greatest weight of a group are the first and the last number of the grid, as in GGUF's Q4_1.
    """
    groups = floats.float().view(len(floats), -1, _GROUP)
    least, greatest = groups.aminmax(dim=-1, keepdim=True)
    scales = (greatest - least) / 15
    values = ((groups - least) / scales.clamp_min(torch.finfo(torch.float32).tiny)).round_()
    error = torch.addcmul(least, values, scales).sub_(groups).abs_()
    if not bool((error <= torch.maximum(greatest, -least) * _ROUNDING).all()):  # NaN is on no grid
        return None
    return values.flatten(1).int(), _scales_and_zeros(scales, least + 8 * scales)


def _grid_of_8_bits(floats: Tensor) -> tuple[Tensor, Tensor] | None:
    """The same for values -127 to 127 around 0, as in GGUF's Q8_0: higher and lower halves [rows, 2 * columns]."""
    groups = floats.float().view(len(floats), -1, _GROUP)
    scales = groups.abs().amax(-1, keepdim=True) / 127
    values = (groups / scales.clamp_min(torch.finfo(torch.float32).tiny)).round_()
    error = (values * scales).sub_(groups).abs_()
    if not bool((error <= groups.abs() * _ROUNDING).all()):
        return None
    whole = values.flatten(1).int()
    higher = _scales_and_zeros(16 * scales, torch.zeros_like(scales))
    lower = _scales_and_zeros(scales, 8 * scales)
    return torch.cat(((whole >> 4) + 8, whole & 15), 1), torch.cat((higher, lower))


def _scales_and_zeros(scales: Tensor, zeros: Tensor) -> Tensor:
    """From [rows, groups, 1] to [groups, rows, 2] bfloat16."""
    return torch.cat((scales, zeros), -1).transpose(0, 1).to(torch.bfloat16).contiguous()
