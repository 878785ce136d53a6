# SPDX-License-Identifier: Apache-2.0
"""The most biases that a request may have, on the logits of every sequence."""

from __future__ import annotations

import torch

from lightllm_backend.request import MAX_LOGIT_BIASES
from perf.kernels.measure import Arguments, Case, Place

SIZES = [(1, 32000), (64, 128256), (256, 128256)]
TINY = [(2, 700)]


def case(place: Place, sequences: int, vocab_size: int) -> Case:
    def make() -> Arguments:
        token_ids = torch.randperm(vocab_size, device=place.device)[:MAX_LOGIT_BIASES].int()
        return {
            "logits": place.randn(sequences, vocab_size).float(),
            "rows": torch.arange(sequences, dtype=torch.int32, device=place.device),
            "counts": place.full(MAX_LOGIT_BIASES, sequences, dtype=torch.int32),
            "token_ids": token_ids.repeat(sequences, 1),
            "biases": place.full(0.1, sequences, MAX_LOGIT_BIASES),
        }

    return Case(
        label=f"{sequences} x {vocab_size}",
        make=make,
        bytes=16 * sequences * MAX_LOGIT_BIASES,
        changes=("logits",),
    )
