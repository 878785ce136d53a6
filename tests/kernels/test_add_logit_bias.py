# SPDX-License-Identifier: Apache-2.0
"""add_logit_bias against the definition, entry by entry."""

import pytest
import torch

from lightllm_backend.kernels import launchers, reference

BOTH = pytest.mark.parametrize("implementation", [reference, launchers])
VOCAB, WIDTH = 1100, 6
# The biases of each sequence; the entries of a table beyond a sequence's count are an earlier request's.
SEQUENCES = [{3: 1.5, 1099: -100.0}, {}, {token: token / 7 for token in range(WIDTH)}, {0: -0.25}]


@BOTH
def test_definition(implementation, device):
    rows = [5, 0, 2, 3]
    token_ids, biases = torch.randint(VOCAB, (7, WIDTH), dtype=torch.int32), torch.full((7, WIDTH), torch.nan)
    for row, entries in zip(rows, SEQUENCES, strict=True):
        token_ids[row, : len(entries)] = torch.tensor([*entries], dtype=torch.int32)
        biases[row, : len(entries)] = torch.tensor([*entries.values()])
    logits = torch.randn(len(rows), VOCAB + 3, device=device)[:, :VOCAB]  # a row of it is no multiple of 16 bytes
    logits[0, 3] = -torch.inf
    expected = logits.clone()
    for row, entries in zip(expected, SEQUENCES, strict=True):
        for token, bias in entries.items():
            row[token] += bias
    counts = torch.tensor([len(entries) for entries in SEQUENCES], dtype=torch.int32, device=device)
    rows = torch.tensor(rows, dtype=torch.int32, device=device)
    implementation.add_logit_bias(logits, rows, counts, token_ids.to(device), biases.to(device))
    assert torch.equal(logits, expected)


@BOTH
def test_no_sequences(implementation, device):
    none = torch.empty(0, dtype=torch.int32, device=device)
    tables = torch.zeros(2, 3, dtype=torch.int32, device=device), torch.zeros(2, 3, device=device)
    implementation.add_logit_bias(torch.empty(0, 7, device=device), none, none, *tables)
