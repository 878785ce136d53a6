# SPDX-License-Identifier: Apache-2.0
"""RoundedTokens and PairedTokens: activations that the kernel before a product has already put into 8 bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightllm_backend.kernels.quantized.weight import QuantizedWeight

# cuBLAS's tile of fp8; it multiplies whole tiles sooner. Of 290 tokens, a layer of 7B took it 177 µs on an H200, of 384
# 144 µs; of 57 counts up to 2,072, all together, those rounded up took 3 % less time.
TILE_TOKENS = 128


@dataclass(frozen=True)
class RoundedTokens:
    """What quantize_tokens makes of activations [tokens, in_features] for one weight, which alone may read it."""

    values: Tensor  # [tokens, in_features], of the dtype and in the order of the weight's values
    scales: Tensor  # [tokens, groups] float32
    dtype: torch.dtype  # of the activations, and of products

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    def __len__(self) -> int:
        return self.values.shape[0]

    @classmethod
    def empty(cls, tokens: int, reader: QuantizedWeight, dtype: torch.dtype) -> RoundedTokens:
        """For a kernel to fill, for the product with `reader`. There is memory for whole tiles of tokens."""
        rows, device = -(-tokens // TILE_TOKENS) * TILE_TOKENS, reader.values.device
        values = torch.empty((rows, reader.shape[1]), dtype=reader.values.dtype, device=device)
        scales = torch.empty((rows, reader.num_groups), dtype=torch.float32, device=device)
        return cls(values[:tokens], scales[:tokens], dtype)

    def whole_tiles(self) -> tuple[Tensor, Tensor]:
        """Values and scales with the rows that fill the last tile, in which anything may be."""
        rows = -(-len(self) // TILE_TOKENS) * TILE_TOKENS
        values, scales = (x.as_strided((rows, x.shape[1]), x.stride()) for x in (self.values, self.scales))
        return values, scales


@dataclass(frozen=True)
class PairedTokens:
    """Activations [tokens, in_features] as sums of two 8-bit numbers each, for one weight, which alone may read them.

    An activation is PAIR_FACTORS times the first number plus the second, times the token's scale: about as precise as
    bfloat16. Tensor cores multiply both by weights of fp8 as they are, and by those of 4 bits as int8, which takes half
    of the instructions that 16 bits take.
    """

    values: Tensor  # [2 * tokens, in_features], both rows of a token in turn; float8_e4m3fn or int8
    scales: Tensor  # [tokens] float32
    dtype: torch.dtype  # of the activations, and of products

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.scales), self.values.shape[1]))

    def __len__(self) -> int:
        return self.scales.shape[0]


# By the dtype of pairs, how many times the second number's unit the first one's is: e4m3 has 4 significant bits.
PAIR_FACTORS = {torch.float8_e4m3fn: 16.0, torch.int8: 256.0}
# The largest magnitudes that a pair holds, in units of the first number for e4m3, of the second for int8.
PAIR_LIMITS = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0 * 256.0}

# What products multiply.
Activations = Tensor | RoundedTokens | PairedTokens
