# SPDX-License-Identifier: Apache-2.0
"""RoundedTokens and PairedTokens: activations that the kernel before a product has already put into 8 bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
        return len(self.values)


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
        return len(self.scales)


# By the dtype of pairs, how many times the second number's unit the first one's is: e4m3 has 4 significant bits.
PAIR_FACTORS = {torch.float8_e4m3fn: 16.0, torch.int8: 256.0}
# The largest magnitudes that a pair holds, in units of the first number for e4m3, of the second for int8.
PAIR_LIMITS = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0 * 256.0}

# What products multiply.
Activations = Tensor | RoundedTokens | PairedTokens
