# SPDX-License-Identifier: Apache-2.0
"""apply_penalties against the definition, token by token, and against transformers' repetition penalty."""

from typing import NamedTuple

import pytest
import torch

from lightllm_backend.kernels import launchers, reference

BOTH = pytest.mark.parametrize("implementation", [reference, launchers])
VOCAB = 1100


class Sequence(NamedTuple):
    prompt: list[int]
    generated: list[int]
    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0
    min_tokens: int = 0
    ending_ids: tuple[int, ...] = (2,)


SEQUENCES = [
    Sequence([1, 2, 3], [4, 4, 3], presence=0.5),
    Sequence([1, 2, 3], [4, 4, 3, 1099], frequency=-0.25),
    Sequence([1, 2, 3], [4, 4, 3], repetition=1.3),
    Sequence([5], [], repetition=0.5),
    Sequence([9, 9, 9], [9, 9, 7], 0.5, 0.25, 2.0, min_tokens=4),
    Sequence([6], [7, 8]),
    Sequence([6], [7, 8], min_tokens=3),
    Sequence([6], [7, 8], min_tokens=2),
    Sequence([6], [7, 8], min_tokens=3, ending_ids=(0, 1099, 1024)),
    Sequence([6], [7, 8], min_tokens=3, ending_ids=()),
]


def _arguments(sequences, device):
    width = max(len(sequence.ending_ids) for sequence in sequences)
    rows = torch.randperm(len(sequences) + 2)[: len(sequences)].tolist()
    tokens = torch.full((len(sequences) + 2, 16), 3, dtype=torch.int32)
    for row, sequence in zip(rows, sequences, strict=True):
        history = sequence.prompt + sequence.generated
        tokens[row, : len(history)] = torch.tensor(history, dtype=torch.int32)
    integers = (rows, [len(s.prompt) for s in sequences], [len(s.prompt + s.generated) for s in sequences])
    floats = ([s.presence for s in sequences], [s.frequency for s in sequences], [s.repetition for s in sequences])
    return (
        tokens.to(device),
        *(torch.tensor(x, dtype=torch.int32, device=device) for x in integers),
        *(torch.tensor(x, dtype=torch.float32, device=device) for x in floats),
        torch.tensor([s.min_tokens for s in sequences], dtype=torch.int32, device=device),
        torch.tensor(
            [(*s.ending_ids, -1, -1, -1, -1)[:width] for s in sequences], dtype=torch.int32, device=device
        ).view(len(sequences), width),
    )


def _expected(logits, sequences):
    out = logits.double().tolist()
    for row, sequence in zip(out, sequences, strict=True):
        for token in set(sequence.prompt + sequence.generated):
            row[token] = row[token] / sequence.repetition if row[token] > 0 else row[token] * sequence.repetition
        for token in set(sequence.generated):
            row[token] -= sequence.generated.count(token) * sequence.frequency + sequence.presence
        if len(sequence.generated) < sequence.min_tokens:
            for token in sequence.ending_ids:
                row[token] = -torch.inf
    return torch.tensor(out)


@BOTH
@pytest.mark.parametrize("sequences", [SEQUENCES, SEQUENCES[:-2], SEQUENCES[-1:]], ids=["three", "one", "none"])
def test_definition(implementation, sequences, device):
    logits = torch.randn(len(sequences), VOCAB, device=device) * 5
    expected = _expected(logits, sequences)
    implementation.apply_penalties(logits, *_arguments(sequences, device))
    assert torch.allclose(logits.cpu(), expected.float(), rtol=1e-6, atol=1e-6)


@BOTH
def test_neutral_rows_are_bit_identical(implementation, device):
    # Signed zeros and subnormal numbers are the ones that a needless operation would change.
    logits = torch.tensor([[-0.0, 1e-42, 1 / 3, -torch.inf, 3e38] * 20] * 3, device=device)
    sequences = [
        Sequence([0], [1, 2], ending_ids=(1,)),
        Sequence([1], [2, 3], frequency=1.0, ending_ids=(1,)),
        Sequence([2, 4], [0, 3], min_tokens=2, ending_ids=(1,)),
    ]
    before = logits.view(torch.int32).clone()
    implementation.apply_penalties(logits, *_arguments(sequences, device))
    after = logits.view(torch.int32)
    assert torch.equal(after[0], before[0])
    assert torch.equal(after[2], before[2])
    changed = (after[1] != before[1]).nonzero().squeeze(1).tolist()
    assert changed == [2]


@BOTH
def test_repetition_is_that_of_transformers(implementation, device):
    processors = pytest.importorskip("transformers.generation.logits_process")
    sequence = Sequence([1, 2, 3, 2], [4, 1], repetition=1.7)
    logits = torch.randn(1, 8, device=device)
    ids = torch.tensor([sequence.prompt + sequence.generated], device=device)
    expected = processors.RepetitionPenaltyLogitsProcessor(1.7)(ids, logits.clone())
    implementation.apply_penalties(logits, *_arguments([sequence], device))
    assert torch.allclose(logits, expected, rtol=1e-6)
