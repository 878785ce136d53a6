# SPDX-License-Identifier: Apache-2.0
"""GridWeight: a weight of 4 or 8 bits for a CPU, which multiplies integers with it.

Weights of so many bits lie on a grid: in each group of 32 input features they are equally spaced numbers. So do floats
that were dequantised from a GGUF file. Reading the numbers from memory takes a quarter of the bytes of floats or half,
and integers multiply faster than floats.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

# Input features of a group, as GGUF has them, and output features of a block.
GROUP = 32
BLOCK = 16
# Scales and least weights, float16, stand before the numbers of each group of a block.
SCALE_BYTES = 2 * 2 * BLOCK
# A weight and the greatest of its group, each rounded to bfloat16, by whose ratio we judge.
_ROUNDING = 2.0**-7
# The most tokens for which a product with the numbers is quicker than with floats in bfloat16; float32 never is.
_FEW_TOKENS = 64
# Numbers that are looked at at once: 2 MiB of float32, which a cache holds.
_CHUNK = 1 << 19
# Bytes of memory that weights share.
_PIECE = 32 << 20


@dataclass(frozen=True)
class GridWeight:
    """A weight [out_features, in_features] on its grid: number * scale + least; with `floats`, the same as such.

    `packed` [blocks, groups, bytes] uint8 is what a product reads, in order: for each block of 16 output features and
    group of 32 input features its scales [16] float16, its least weights [16] float16, and its numbers. These are
    [8, 16, 4] bytes, four input features of each output feature side by side; of 4 bits, [4, 16, 4] bytes with the
    first 16 input features in their lower halves and the others in their higher ones.
    """

    floats: Tensor | None
    packed: Tensor
    bits: int

    @cached_property
    def array(self) -> NDArray[np.uint8]:
        """`packed` for a compiled kernel."""
        array: NDArray[np.uint8] = self.packed.numpy()
        return array

    @cached_property
    def shape(self) -> torch.Size:
        blocks, groups, _ = self.packed.shape
        return torch.Size((blocks * BLOCK, groups * GROUP))

    def takes(self, x: Tensor) -> bool:
        """Whether the product with `x` [tokens, in_features] is that of the numbers."""
        return self.floats is None or x.shape[0] <= _FEW_TOKENS or x.dtype == torch.float32

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The plain PyTorch of the product with `x`, whose activations are rounded to 8 bits in groups of 32."""
        if self.floats is not None and not self.takes(x):
            return functional.linear(x, self.floats, bias)
        groups = x.float().view(len(x), -1, GROUP)
        scales = groups.abs().amax(-1, keepdim=True) / 127
        values = (groups / scales.clamp_min(1e-30)).round_() * scales
        product = functional.linear(values.flatten(1), self.dequantized(), None if bias is None else bias.float())
        return product.to(x.dtype)

    def dequantized(self) -> Tensor:
        """The weight that the grid expresses, [out_features, in_features] float32."""
        blocks, groups, _ = self.packed.shape
        heads = self.packed[:, :, :SCALE_BYTES].contiguous().view(torch.float16).float()
        scales, least = heads.view(blocks, groups, 2, BLOCK, 1).unbind(2)
        numbers = self.packed[:, :, SCALE_BYTES:].reshape(blocks, groups, -1, BLOCK, 4)
        if self.bits == 4:
            numbers = torch.cat((numbers & 15, numbers >> 4), 2)
        weights: Tensor = numbers.transpose(2, 3).flatten(3) * scales + least  # [blocks, groups, 16, 32]
        return weights.transpose(1, 2).reshape(self.shape)


def with_grid(floats: Tensor) -> Tensor | GridWeight:
    """The weight [out_features, in_features] with its grid, or alone if it has none or this CPU no kernel for it."""
    if not can_pack(floats.shape, floats.device):
        return floats
    bits = next((bits for bits in (4, 8) if _on_grid(floats[:BLOCK], bits)), None)
    if bits is None:
        return floats
    grid = make_grid(floats.shape, bits, lambda rows: _on_grid(floats[rows], bits))
    return floats if grid is None else replace(grid, floats=floats)


def can_pack(shape: Sequence[int], device: torch.device) -> bool:
    """Whether a weight [out_features, in_features] has whole groups, and whole blocks of a gate and of what it
    multiplies, and this CPU has a kernel."""
    return shape[0] % (2 * BLOCK) == 0 and shape[1] % GROUP == 0 and has_kernel(device)


# For some rows of a weight: their numbers [rows, in_features], and the scales and least weights [rows, groups] float16.
OnGrid = tuple[Tensor, Tensor, Tensor]


def make_grid(shape: Sequence[int], bits: int, rows_on_grid: Callable[[slice], OnGrid | None]) -> GridWeight | None:
    """Pack a weight [out_features, in_features] of this CPU, some rows at a time; None if any lie on no grid."""
    rows, columns = shape
    packed = _memory.take(rows // BLOCK, columns // GROUP, SCALE_BYTES + GROUP * bits // 8 * BLOCK)
    step = max(BLOCK, _CHUNK // columns // BLOCK * BLOCK)
    for first in range(0, rows, step):
        if (on_grid := rows_on_grid(slice(first, first + step))) is None:
            return None
        packed[first // BLOCK : (first + step) // BLOCK] = _packed(*on_grid, bits)
    return GridWeight(None, packed, bits)


class _HugePages:
    """Memory of many weights in large pieces, for which NumPy asks Linux for pages of 2 MiB.

    A step reads every weight once, so with pages of 4 KiB each begins with a miss of the page tables.
    """

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8)

    def take(self, *shape: int) -> Tensor:
        """A tensor [shape] uint8 that begins at a multiple of 64 bytes."""
        count = math.prod(shape)
        if len(self._free) < count:
            self._free = torch.from_numpy(np.empty(max(count + 64, _PIECE), np.uint8))
            self._free = self._free[-self._free.data_ptr() % 64 :]
        taken, self._free = self._free[:count], self._free[-(-count // 64) * 64 :]
        return taken.view(shape)


_memory = _HugePages()


def has_kernel(device: torch.device) -> bool:
    """Whether numba is there, and compiles the product for this CPU."""
    if device.type != "cpu" or importlib.util.find_spec("numba") is None:
        return False
    from numba.core.registry import cpu_target

    features = cpu_target.target_context.codegen().magic_tuple()[2].split(",")
    return {"+avx2", "+f16c", "+fma"}.issubset(features)


def _on_grid(floats: Tensor, bits: int) -> OnGrid | None:
    """The grid of so many bits on which these rows lie, or None if there is none.

    In each group, 4 bits count from the least weight to the greatest, as in GGUF's Q4_1. 8 bits count from -128, of
    which the greatest magnitude is 127, as in Q8_0.
    """
    groups = floats.float().view(len(floats), -1, GROUP)
    if bits == 4:
        least, greatest = groups.aminmax(dim=-1, keepdim=True)
        scales, tolerance = (greatest - least) / 15, torch.maximum(greatest, -least)
    else:
        scales, tolerance = groups.abs().amax(-1, keepdim=True) / 127, groups.abs()
        least = -128 * scales
    numbers = ((groups - least) / scales.clamp_min(torch.finfo(torch.float32).tiny)).round_()
    scales, least = scales.half(), least.half()
    error = torch.addcmul(least.float(), numbers, scales.float()).sub_(groups).abs_()
    if not bool((error <= tolerance * _ROUNDING).all()):  # NaN is on no grid
        return None
    return numbers.to(torch.uint8).flatten(1), scales.squeeze(-1), least.squeeze(-1)


def _packed(numbers: Tensor, scales: Tensor, least: Tensor, bits: int) -> Tensor:
    """Rows as GridWeight packs them."""
    count = scales.shape[1]
    heads = torch.stack((scales, least), -1).view(-1, BLOCK, count, 2).permute(0, 2, 3, 1).contiguous()
    values = numbers.view(-1, BLOCK, count, GROUP // 4, 4).permute(0, 2, 3, 1, 4)
    if bits == 4:
        values = values[:, :, :4] | values[:, :, 4:] << 4
    return torch.cat((heads.flatten(2).view(torch.uint8), values.flatten(2)), -1)
