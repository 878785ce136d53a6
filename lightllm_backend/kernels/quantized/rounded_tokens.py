# SPDX-License-Identifier: Apache-2.0
"""RoundedTokens: activations that the kernel before a product has already rounded to 8 bits."""

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


# What products multiply.
Activations = Tensor | RoundedTokens
