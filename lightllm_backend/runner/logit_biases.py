# SPDX-License-Identifier: Apache-2.0
"""LogitBiases: the logit biases of all running sequences, on the device, indexed by row.

A request uploads its biases once, when it is admitted; a step then uploads their counts alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lightllm_backend.request import MAX_LOGIT_BIASES, SamplingParams
from lightllm_backend.runner.staging import Staging

# Sequences per upload, which bounds the size of the host buffers: 300 KB.
_ADMITTED_AT_ONCE = 64


class LogitBiases:
    """Two tables of what each row's request has, `token_ids[row, entry]` and `biases[row, entry]`, and the counts."""

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self.counts = np.zeros(num_rows, dtype=np.int32)  # entries of each row, on the host
        self.token_ids = torch.zeros((num_rows, MAX_LOGIT_BIASES), dtype=torch.int32, device=device)
        self.biases = torch.zeros((num_rows, MAX_LOGIT_BIASES), dtype=torch.float32, device=device)

    def admit(self, rows: Sequence[int], params: Sequence[SamplingParams], staging: Staging) -> None:
        """Set the biases of the new owners of `rows`."""
        self.counts[rows] = [len(sampling.logit_bias) for sampling in params]
        biased = [(row, one.logit_bias) for row, one in zip(rows, params, strict=True) if one.logit_bias]
        for first in range(0, len(biased), _ADMITTED_AT_ONCE):
            part = biased[first : first + _ADMITTED_AT_ONCE]
            indices = np.concatenate([row * MAX_LOGIT_BIASES + np.arange(len(entries)) for row, entries in part])
            token_ids, biases = zip(*(entry for _, entries in part for entry in entries), strict=True)
            uploaded = staging.upload(indices, np.array(token_ids, np.int32), np.array(biases, np.float32))
            self.token_ids.view(-1).index_copy_(0, uploaded[0], uploaded[1])
            self.biases.view(-1).index_copy_(0, uploaded[0], uploaded[2])
