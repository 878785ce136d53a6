# SPDX-License-Identifier: Apache-2.0
"""apply_token_masks: tokens without their bit become -inf, the others stay as they are, in float32."""

import numpy as np
import pytest
import torch

from lightllm_backend.kernels import launchers, reference

BOTH = pytest.mark.parametrize("implementation", [reference, launchers])


def random_masks(count: int, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks as words, and what they allow, as booleans."""
    allowed = torch.rand(count, vocab_size) < 0.3
    bits = torch.nn.functional.pad(allowed, (0, -vocab_size % 32), value=True)  # bits past the vocabulary mean nothing
    words = np.packbits(bits.numpy(), axis=1, bitorder="little").view(np.int32)
    return torch.from_numpy(words), allowed


@BOTH
@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 4095, 4097, 9001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rules_out_what_the_mask_does_not_allow(implementation, vocab_size, dtype, device):
    words, allowed = random_masks(3, vocab_size)
    logits = torch.randn(5, vocab_size, device=device).to(dtype)
    before = logits.clone()
    mask_rows = [2, -1, 0, 2, 1]
    out = logits if dtype is torch.float32 else torch.full((5, vocab_size), torch.nan, device=device)
    implementation.apply_token_masks(
        logits, words.to(device), torch.tensor(mask_rows, dtype=torch.int32, device=device), out
    )
    for row, mask_row in enumerate(mask_rows):
        kept = (
            allowed[mask_row].to(device) if mask_row >= 0 else torch.ones(vocab_size, dtype=torch.bool, device=device)
        )
        assert torch.equal(out[row], torch.where(kept, before[row].float(), -torch.inf))


@BOTH
def test_rows_of_a_wider_tensor(implementation, device):
    words, allowed = random_masks(2, 65)
    wide = torch.zeros(2, 72, device=device)
    mask_rows = torch.tensor([1, 0], dtype=torch.int32, device=device)
    implementation.apply_token_masks(wide[:, :65], words.to(device), mask_rows, wide[:, :65])
    assert torch.equal(wide[:, :65].isfinite().cpu(), allowed[[1, 0]])
    assert not wide[:, 65:].any()


@BOTH
def test_no_sequences(implementation, device):
    no_rows = torch.empty(0, dtype=torch.int32, device=device)
    logits = torch.empty(0, 40, device=device)
    implementation.apply_token_masks(logits, no_rows.view(0, 2), no_rows, logits)
