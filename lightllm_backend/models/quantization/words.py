# SPDX-License-Identifier: Apache-2.0
"""Numbers of 4 and 8 bits in words of 32, as AWQ, GPTQ and compressed-tensors pack them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightllm_backend.models.quantization.matrix import Span


class Words(NamedTuple):
    """The words of 32 bits that hold a span of features, `per_word` in each, and where the span begins in them."""

    per_word: int
    total: int
    part: slice
    skipped: int
    held: int

    @classmethod
    def of(cls, span: Span, per_word: int) -> Words:
        first = span.start // per_word
        part = slice(first, -(-span.stop // per_word))
        return cls(per_word, -(-span.full // per_word), part, span.start - first * per_word, span.held)

    def unpack(self, words: Tensor, dim: int, order: Sequence[int] | None = None) -> Tensor:
        """The features of words [n, m] int32 along `dim`, as numbers without a sign.

        Feature i of a word is in its bits from order[i] * bits on, or from i * bits on.
        """
        bits = 32 // self.per_word
        places = torch.tensor(range(self.per_word) if order is None else order, device=words.device) * bits
        words = words.movedim(dim, -1)
        numbers = words.unsqueeze(-1) >> places.to(torch.int32) & (1 << bits) - 1
        numbers = numbers.flatten(-2)[..., self.skipped : self.skipped + self.held]
        return numbers.to(torch.uint8).movedim(-1, dim)
