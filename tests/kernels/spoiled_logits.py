# SPDX-License-Identifier: Apache-2.0
"""Rows of logits that are not numbers, among rows that are."""

import torch
from torch import Tensor


def spoiled_logits(vocab_size: int) -> Tensor:
    """Logits [12, vocab_size] float32. In the odd rows some are NaN, or the greatest is infinite."""
    logits = torch.randn(12, vocab_size)
    last = vocab_size - 1
    logits[1] = torch.nan
    logits[3] = -torch.inf
    logits[5, 0] = torch.nan
    logits[7, last] = torch.nan
    logits[9, last // 2] = torch.inf
    logits[11] = -torch.inf
    logits[11, last] = torch.nan
    logits[2, 1:] = -torch.inf
    return logits
