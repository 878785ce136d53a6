# SPDX-License-Identifier: Apache-2.0
"""Sampler: biases and penalties, then a greedy choice or a draw, for all sequences of a step in a few launches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightllm_backend.kernels.interface import Kernels
from lightllm_backend.request import MAX_STOP_TOKEN_IDS, SamplingParams
from lightllm_backend.runner.device_tables import DeviceTables
from lightllm_backend.runner.logit_biases import LogitBiases
from lightllm_backend.runner.staging import Staging

_FLOATS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
_INTEGERS = ("top_k", "min_tokens")
_NO_TOKEN = -1


class Top(NamedTuple):
    """The k likeliest tokens of the sequences that ask for any, likeliest first."""

    samples: NDArray[np.int64]  # [a] which of the m sequences
    token_ids: Tensor  # [a, k] int32
    log_probs: Tensor  # [a, k] float32


class Sampled(NamedTuple):
    """The tokens of m sequences."""

    token_ids: Tensor  # [m] int32; -1: the logits are not numbers
    log_probs: Tensor | None = None  # [m] float32
    top: Top | None = None


def _ends_at_once(sampling: SamplingParams, ending_ids: Sequence[int]) -> bool:
    """Whether every token that is allowed ends the sequence."""
    return set(sampling.allowed_token_ids) <= set(ending_ids)


class Sampler:
    """Keeps the sampling parameters of each row on the host. A step uploads those of its rows if it needs any."""

    def __init__(self, kernels: Kernels, num_rows: int, eos_ids: Sequence[int], device: torch.device) -> None:
        self._kernels = kernels
        self._eos_ids = tuple(eos_ids)
        self._floats = np.zeros((len(_FLOATS), num_rows), dtype=np.float32)
        self._integers = np.zeros((len(_INTEGERS), num_rows), dtype=np.int32)
        self._ending_ids = np.full((num_rows, len(eos_ids) + MAX_STOP_TOKEN_IDS), _NO_TOKEN, dtype=np.int32)
        self._num_ending_ids = np.zeros(num_rows, dtype=np.int32)
        self._seeds = np.zeros(num_rows, dtype=np.uint64)
        self._drawn = np.zeros(num_rows, dtype=bool)
        self._penalised = np.zeros(num_rows, dtype=bool)
        self._log_probs = np.zeros(num_rows, dtype=bool)
        self._top_logprobs = np.zeros(num_rows, dtype=np.int32)
        self._biases = LogitBiases(num_rows, device)
        self._greedy = np.ones(num_rows, dtype=bool)  # the likeliest token that is allowed is all that is asked for
        self._plain_greedy = np.ones(num_rows, dtype=bool)  # moreover all tokens are allowed
        self._uploaded: tuple[NDArray[np.int32], list[Tensor]] | None = None  # rows, and their parameters

    def admit(self, rows: Sequence[int], params: Sequence[SamplingParams], staging: Staging) -> None:
        """Set the sampling parameters of the new owners of `rows`."""
        for row, sampling in zip(rows, params, strict=True):
            self._floats[:, row] = [getattr(sampling, name) for name in _FLOATS]
            self._integers[:, row] = [getattr(sampling, name) for name in _INTEGERS]
            if sampling.greedy:
                self._floats[0, row] = 0.0  # the kernel takes temperature 0 as greedy
            ending_ids = sampling.ending_ids(self._eos_ids)
            if sampling.structured_output or (sampling.allowed_token_ids and _ends_at_once(sampling, ending_ids)):
                # The masks of structured output know min_tokens. If nothing but the end is allowed, the end wins.
                self._integers[_INTEGERS.index("min_tokens"), row] = 0
            self._num_ending_ids[row] = len(ending_ids)
            self._ending_ids[row] = _NO_TOKEN
            self._ending_ids[row, : len(ending_ids)] = ending_ids
            self._seeds[row] = sampling.seed
            self._drawn[row] = self._floats[0, row] != 0
            self._penalised[row] = sampling.penalised
            self._log_probs[row] = sampling.return_log_probs
            self._top_logprobs[row] = sampling.top_logprobs
            self._greedy[row] = not (
                self._drawn[row] or self._penalised[row] or self._log_probs[row] or sampling.logit_bias
            )
            self._plain_greedy[row] = self._greedy[row] and not sampling.masked
        self._biases.admit(rows, params, staging)
        self._uploaded = None

    def is_plain_greedy(self, rows: NDArray[np.int32]) -> bool:
        """Whether these rows ask for nothing but the model's likeliest token, which the step has chosen already."""
        return bool(self._plain_greedy[rows].all())

    def is_greedy(self, rows: NDArray[np.int32]) -> bool:
        """Whether these rows ask for nothing but the likeliest token of those that their masks allow."""
        return bool(self._greedy[rows].all())

    def _asking(self, rows: NDArray[np.int32]) -> NDArray[np.int64]:
        """Which of the rows ask for the likeliest tokens."""
        asking: NDArray[np.int64] = self._top_logprobs[rows].nonzero()[0]
        return asking

    def _most_ending_ids(self, rows: NDArray[np.int32]) -> int:
        return int(self._num_ending_ids[rows].max(initial=0))

    def _parameters(self, rows: NDArray[np.int32], tables: DeviceTables, staging: Staging) -> list[Tensor]:
        """Return what these rows ask for, on the device. From one decode step to the next it stays the same."""
        if self._uploaded is not None and np.array_equal(self._uploaded[0], rows):
            return self._uploaded[1]
        ending_ids = self._ending_ids[rows, : self._most_ending_ids(rows)]
        tensors = staging.upload(
            *self._floats[:, rows], *self._integers[:, rows], self._seeds[rows].view(np.int64),
            tables.prompt_lengths[rows], rows, self._biases.counts[rows], self._asking(rows), ending_ids.ravel(),
        )  # fmt: skip
        self._uploaded = rows, tensors
        return tensors

    def sample(
        self,
        logits: Tensor,
        rows: NDArray[np.int32],
        lengths: NDArray[np.int32],
        tables: DeviceTables,
        staging: Staging,
        places: Tensor,
        masks: tuple[Tensor, Tensor] | None = None,
    ) -> Sampled:
        """Sample a token for each sequence, with log probabilities if any sequence asks for them.

        logits [m, vocab]: of the sequences in `rows`; may be modified in place. lengths [m]: tokens before the sampled
        one. places [m] int64: where in the flattened table of token ids the tokens are written too. masks: what
        apply_token_masks takes. The log probabilities are those of the model's distribution, before biases, penalties,
        masks and temperature.
        """
        is_penalised, with_log_probs = self._penalised[rows].any(), self._log_probs[rows].any()
        is_biased = self._biases.counts[rows].any()
        (
            temperature, top_p, min_p, presence, frequency, repetition, top_k, min_tokens, seeds,
            prompt_lengths, device_rows, bias_counts, device_asking, device_ending_ids,
        ) = self._parameters(rows, tables, staging)  # fmt: skip
        [device_lengths] = staging.upload(lengths)
        is_changed = is_biased or is_penalised
        if is_changed or with_log_probs or masks is None:  # else the masks' kernel makes it float32
            logits = logits.float().contiguous()
        original = logits
        if is_changed and with_log_probs:
            logits = logits.clone()
        if is_biased:  # before penalties, as in vLLM
            self._kernels.add_logit_bias(logits, device_rows, bias_counts, self._biases.token_ids, self._biases.biases)
        if is_penalised:
            self._kernels.apply_penalties(
                logits, tables.token_ids[:, : lengths.max()], device_rows, prompt_lengths, device_lengths,
                presence, frequency, repetition, min_tokens,
                device_ending_ids.view(len(rows), self._most_ending_ids(rows)),
            )  # fmt: skip
        if masks is not None:
            unmasked = logits
            logits = unmasked if is_changed else torch.empty_like(unmasked, dtype=torch.float32)
            self._kernels.apply_token_masks(unmasked, *masks, logits)
        target = places, tables.token_ids.view(-1)
        if self._drawn[rows].any():
            token_ids = self._kernels.sample(logits, temperature, top_k, top_p, min_p, seeds, device_lengths, *target)
        else:
            token_ids = self._kernels.choose_greedily(logits, *target)
        if not with_log_probs:
            return Sampled(token_ids)
        log_sums = original.logsumexp(-1)
        chosen = original.gather(1, token_ids.clamp_min(0).long().unsqueeze(1)).squeeze(1)
        asking = self._asking(rows)
        if len(asking) == 0:
            return Sampled(token_ids, chosen - log_sums)
        count = min(int(self._top_logprobs[rows].max()), original.shape[1])
        values, ids = likeliest(original.index_select(0, device_asking), count)
        top_log_probs = values - log_sums.index_select(0, device_asking).unsqueeze(1)
        return Sampled(token_ids, chosen - log_sums, Top(asking, ids.int(), top_log_probs))


def likeliest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The greatest logits of each row and their tokens, [a, count]. Equal ones are in the order of tokens, of which
    choose_greedily takes the first."""
    values, ids = logits.topk(count, -1)
    ids, order = ids.sort(-1)
    values, order = values.gather(-1, order).sort(stable=True, descending=True)
    return values, ids.gather(-1, order)
