# SPDX-License-Identifier: Apache-2.0
"""The batched sampler: penalties, then greedy choice or a draw, for all sequences of a step in a few launches."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightllm_backend.request import SamplingParams
from lightllm_backend.runner.device_batch import RequestTables, Sampled, upload

_FLOATS = ("temperature", "top_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
_INTEGERS = ("top_k", "min_tokens")


class Sampler:
    """Keeps the sampling parameters by request row, on the host; a step uploads only what its rows make use of."""

    def __init__(self, kernels: ModuleType, num_rows: int, eos_ids: Sequence[int], device: torch.device) -> None:
        self._kernels = kernels
        self._device = device
        self._eos_ids = torch.tensor(list(eos_ids), dtype=torch.int32, device=device)
        self._floats = np.zeros((len(_FLOATS), num_rows), dtype=np.float32)
        self._integers = np.zeros((len(_INTEGERS), num_rows), dtype=np.int32)
        self._seeds = np.zeros(num_rows, dtype=np.uint64)
        self._penalised = np.zeros(num_rows, dtype=bool)
        self._log_probs = np.zeros(num_rows, dtype=bool)

    def admit(self, rows: Sequence[int], params: Sequence[SamplingParams]) -> None:
        for row, sampling in zip(rows, params, strict=True):
            self._floats[:, row] = [getattr(sampling, name) for name in _FLOATS]
            self._integers[:, row] = [getattr(sampling, name) for name in _INTEGERS]
            if sampling.greedy:
                self._floats[0, row] = 0.0  # temperature 0 is what the kernel knows as greedy
            if sampling.ignore_eos:
                self._integers[1, row] = 0  # EOS is an ordinary token then, also before min_tokens
            self._seeds[row] = sampling.seed
            self._penalised[row] = sampling.penalised
            self._log_probs[row] = sampling.return_log_probs

    def is_plain_greedy(self, rows: NDArray[np.int32]) -> bool:
        """Whether the likeliest token of the model's own distribution is all that these rows ask for."""
        return not (self._floats[0, rows].any() or self._penalised[rows].any() or self._log_probs[rows].any())

    def sample(self, logits: Tensor, sampled: Sampled, tables: RequestTables) -> tuple[Tensor, Tensor | None]:
        """Token ids [m] int32, and log probabilities [m] float32 where any sequence asks for them.

        logits: [m, vocab] float32 of the sampled sequences; they may be changed. Log probabilities are those of the
        model's own distribution, before penalties and temperature.
        """
        rows = sampled.host_rows
        log_probs = self._log_probs[rows].any()
        original = logits
        if self._penalised[rows].any():
            logits = logits.clone() if log_probs else logits
            self._penalise(logits, sampled, tables)
        tokens = self._choose(logits, sampled)
        if not log_probs:
            return tokens, None
        chosen = original.gather(1, tokens.long().unsqueeze(1)).squeeze(1)
        return tokens, chosen - original.logsumexp(-1)

    def _penalise(self, logits: Tensor, sampled: Sampled, tables: RequestTables) -> None:
        rows = sampled.host_rows
        presence, frequency, repetition = self._upload_floats(self._floats[2:, rows])
        prompt_lengths, min_tokens = upload([tables.prompt_lengths[rows], self._integers[1, rows]], self._device)
        self._kernels.apply_penalties(
            logits, tables.tokens, sampled.rows, prompt_lengths, sampled.lengths,
            presence, frequency, repetition, min_tokens, self._eos_ids,
        )  # fmt: skip

    def _choose(self, logits: Tensor, sampled: Sampled) -> Tensor:
        rows = sampled.host_rows
        if not self._floats[0, rows].any():
            greedy: Tensor = logits.argmax(-1).int()
            return greedy
        temperature, top_p = self._upload_floats(self._floats[:2, rows])
        # 64-bit seeds travel as pairs of int32; first, so that they are aligned.
        seeds, top_k = upload([self._seeds[rows].view(np.int32), self._integers[0, rows]], self._device)
        tokens: Tensor = self._kernels.sample(
            logits, temperature, top_k, top_p, seeds.view(torch.int64), sampled.lengths
        )
        return tokens

    def _upload_floats(self, values: NDArray[np.float32]) -> list[Tensor]:
        flat = np.ascontiguousarray(values, dtype=np.float32)
        return [tensor.view(torch.float32) for tensor in upload(list(flat.view(np.int32)), self._device)]
