# SPDX-License-Identifier: Apache-2.0
"""choose_greedily: the first of the greatest logits, returned and written to the table."""

import pytest
import torch

from lightllm_backend.kernels import launchers, reference
from tests.kernels.spoiled_logits import spoiled_logits
from tests.kernels.test_apply_token_masks import random_masks

BOTH = pytest.mark.parametrize("implementation", [reference, launchers])


@BOTH
@pytest.mark.parametrize("vocab_size", [1, 3, 1000, 16384, 40001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_takes_the_greatest_and_writes_it(implementation, vocab_size, dtype, device):
    # In 16 bits many are equal, and the first of them is meant.
    logits = torch.randn(5, vocab_size, device=device).to(dtype)
    places = torch.tensor([7, 0, 19, 3, 11], device=device)
    table = torch.full((4, 5), -1, dtype=torch.int32, device=device)
    tokens = implementation.choose_greedily(logits, places, table.view(-1))
    greatest = logits == logits.amax(-1, keepdim=True)
    expected = [int(row.nonzero()[0]) for row in greatest]
    assert tokens.tolist() == expected
    assert tokens.dtype == torch.int32
    assert table.view(-1)[places].tolist() == expected
    assert int((table == -1).sum()) == 15


@BOTH
@pytest.mark.parametrize("vocab_size", [1, 40, 40001])
def test_takes_the_greatest_that_the_mask_allows(implementation, vocab_size, device):
    words, allowed = random_masks(2, vocab_size)
    logits = torch.randn(4, vocab_size, device=device).to(torch.bfloat16)
    places, table = torch.arange(4, device=device), torch.full((4,), -1, dtype=torch.int32, device=device)
    mask_rows = torch.tensor([1, -1, 0, 1], dtype=torch.int32, device=device)
    tokens = implementation.choose_greedily(logits, places, table, words.to(device), mask_rows)
    kept = torch.where(allowed[[1, 0, 0, 1]].to(device), logits, -torch.inf)
    kept[1] = logits[1]
    expected = [int((row == row.max()).nonzero()[0]) if row.max() > -torch.inf else -1 for row in kept]
    assert tokens.tolist() == expected
    assert table.tolist() == [max(0, token) for token in expected]


@BOTH
def test_first_of_equals(implementation, device):
    logits = torch.full((2, 40000), -1.0, device=device)
    logits[0, [39000, 17, 16401]] = 50.0
    logits[1, [0, 39999]] = -0.5
    places, table = torch.arange(2, device=device), torch.zeros(2, dtype=torch.int32, device=device)
    assert implementation.choose_greedily(logits, places, table).tolist() == [17, 0]


@BOTH
@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("vocab_size", [1, 40, 40001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_no_token_where_logits_are_not_numbers(implementation, is_masked, vocab_size, dtype, device):
    """The table then gets token 0, and the rows beside are chosen as ever."""
    logits = spoiled_logits(vocab_size).to(device, dtype)
    rows = len(logits)
    places = torch.arange(rows, device=device).flip(0)
    table = torch.full((rows,), 7, dtype=torch.int32, device=device)
    masks = ()
    if is_masked:
        words = torch.full((1, -(-vocab_size // 32)), -1, dtype=torch.int32, device=device)
        masks = words, torch.arange(rows, dtype=torch.int32, device=device) % 2 - 1
    tokens = implementation.choose_greedily(logits, places, table, *masks)
    assert tokens.tolist() == [-1 if row % 2 else int(logits[row].argmax()) for row in range(rows)]
    assert table[places].tolist() == tokens.clamp_min(0).tolist()


@BOTH
def test_what_the_mask_rules_out_need_not_be_a_number(implementation, device):
    logits = torch.tensor([[torch.nan, 1.0, 2.0, torch.inf], [3.0, torch.nan, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]])
    masks = torch.tensor([[0b0110], [0]], dtype=torch.int32, device=device)
    mask_rows = torch.tensor([0, 0, 1], dtype=torch.int32, device=device)
    places, table = torch.arange(3, device=device), torch.full((3,), 7, dtype=torch.int32, device=device)
    tokens = implementation.choose_greedily(logits.to(device), places, table, masks, mask_rows)
    assert tokens.tolist() == [2, -1, -1]
    assert table.tolist() == [2, 0, 0]


@BOTH
def test_rows_of_a_wider_tensor(implementation, device):
    logits = torch.randn(4, 72, device=device)
    logits[:, 65:] = torch.inf
    places, table = torch.arange(4, device=device), torch.zeros(4, dtype=torch.int32, device=device)
    tokens = implementation.choose_greedily(logits[:, :65], places, table)
    assert tokens.tolist() == logits[:, :65].argmax(-1).tolist()


@BOTH
def test_padding_may_share_a_place(implementation, device):
    logits = torch.randn(3, 9, device=device)
    table = torch.zeros(4, dtype=torch.int32, device=device)
    tokens = implementation.choose_greedily(logits, torch.tensor([1, 3, 3], device=device), table)
    assert table[1] == tokens[0]
    assert table[3] in tokens[1:]


@BOTH
def test_no_sequences(implementation, device):
    places, table = torch.empty(0, dtype=torch.int64, device=device), torch.zeros(4, dtype=torch.int32, device=device)
    assert implementation.choose_greedily(torch.empty(0, 7, device=device), places, table).shape == (0,)
