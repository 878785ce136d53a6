# SPDX-License-Identifier: Apache-2.0
"""count_tokens against counting by hand."""

from collections import Counter

import pytest
import torch

from lightllm_backend.kernels import launchers, reference
from lightllm_backend.kernels.sampling.reference import IN_PROMPT


@pytest.mark.parametrize("implementation", [reference, launchers])
def test_counts(implementation, device):
    vocab_size = 11
    tokens = torch.randint(0, vocab_size, (5, 1300))
    rows, prompt_lengths, lengths = [3, 0, 4, 1], [2, 1030, 7, 0], [2, 1100, 30, 0]
    # What lies behind a sequence's end is another's and may be anything.
    for row, length in zip(rows, lengths, strict=True):
        tokens[row, length:] = -7
    expected = torch.zeros((4, vocab_size), dtype=torch.int32)
    for index, (row, prompt, length) in enumerate(zip(rows, prompt_lengths, lengths, strict=True)):
        for token, count in Counter(tokens[row, prompt:length].tolist()).items():
            expected[index, token] = count
        for token in set(tokens[row, :prompt].tolist()):
            expected[index, token] += IN_PROMPT
    arrays = [torch.tensor(x, dtype=torch.int32, device=device) for x in (rows, prompt_lengths, lengths)]
    out = implementation.count_tokens(tokens.to(device, torch.int32), *arrays, vocab_size)
    assert torch.equal(out.cpu(), expected)


@pytest.mark.parametrize("implementation", [reference, launchers])
def test_no_sequences(implementation, device):
    none = torch.empty(0, dtype=torch.int32, device=device)
    tokens = torch.zeros((2, 4), dtype=torch.int32, device=device)
    assert implementation.count_tokens(tokens, none, none, none, 5).shape == (0, 5)
