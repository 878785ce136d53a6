# SPDX-License-Identifier: Apache-2.0
"""Admission: forecasts the peak of the KV pool, and lets a sequence in only if the pool can hold that peak.

Each sequence takes one more token slot in every step until it ends, and then returns all of them. Between two ends the
demand only grows, so it peaks at a step in which some sequence takes its last slot. Sort the sequences by the steps
they have left, longest first. When sequence i takes its last slot, sequences 1 … i are alive, and each has taken
remaining_i more slots:

    peak = max over i of (remaining_i · i + held_1 + … + held_i)

A policy estimates the steps that a sequence has left: all that it asks for (ExactAdmission), or what the recent past
makes likely (past_future.py).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from lightllm_backend.router.sequence import Sequence


class Demand(NamedTuple):
    """What n sequences hold and may still take: one array per fact."""

    held: NDArray[np.int64]  # [n] token slots now
    remaining: NDArray[np.int64]  # [n] slots that each may still take, one per step
    num_generated: NDArray[np.int64]  # [n] tokens generated so far; max_tokens - 1 if EOS cannot end the sequence
    max_tokens: NDArray[np.int64]  # [n]
    quantiles: NDArray[np.float64]  # [n, draws] of the distribution of lengths, drawn by the policy


def candidate_demand(sequence: Sequence, planned: int, num_shared: int, batch_max_tokens: int) -> Demand:
    """The demand of one sequence after `planned` of its known tokens, without the `num_shared` slots of other holders.

    The rest of the prefill takes k more steps. We model it as a sequence that starts k slots smaller and gains one slot
    per step; this is an upper bound, since each of the k steps caches at least one token.
    """
    steps = -(-(sequence.known_length - planned) // batch_max_tokens)
    sampling, num_generated = sequence.request.sampling, sequence.num_generated
    return Demand(
        held=np.array([sequence.known_length - num_shared - steps]),
        remaining=np.array([sampling.max_sampled - num_generated - 1 + steps]),
        num_generated=np.array([sampling.max_sampled - 1 if sampling.ignore_eos else num_generated]),
        max_tokens=np.array([sampling.max_sampled]),
        quantiles=sequence.quantiles[np.newaxis],
    )


class AdmissionPolicy(Protocol):
    """Estimates how many steps sequences have left."""

    def draw_quantiles(self) -> NDArray[np.float64]:
        """Draw the quantiles of a new sequence, [draws]. The sequence keeps them."""

    def steps_left(self, demand: Demand) -> NDArray[np.int64]:
        """Estimate the steps that each sequence has left, [draws, n]. Every draw must fit the pool."""

    def usable(self, capacity: int) -> int:
        """How many of `capacity` slots admission may plan with."""

    def record_length(self, length: int) -> None:
        """Record the length of an answer that EOS, a stop string or max_tokens has ended."""


class ExactAdmission:
    """Keeps room for all the tokens that each sequence asks for, so that no sequence is ever preempted."""

    def draw_quantiles(self) -> NDArray[np.float64]:
        return np.zeros(1)

    def steps_left(self, demand: Demand) -> NDArray[np.int64]:
        return demand.remaining[np.newaxis]

    def usable(self, capacity: int) -> int:
        return capacity

    def record_length(self, length: int) -> None:
        pass


class Forecast:
    """The peak number of token slots that a set of sequences will hold, and how one more sequence would change it."""

    def __init__(self, held: NDArray[np.int64], remaining: NDArray[np.int64]) -> None:
        """held [n]: token slots now. remaining [n]: slots that each sequence will still take, one per step."""
        negative = -remaining
        longest_first = np.argsort(negative)
        self._negative = negative[longest_first]  # [n] ascending, for searchsorted
        # [n + 1] slots that the sequences before each place hold
        self._held_sums = np.zeros(len(held) + 1, dtype=np.int64)
        np.cumsum(held[longest_first], out=self._held_sums[1:])
        self._terms = self._make_terms()

    @property
    def peak(self) -> int:
        return int(self._terms.max(initial=0))

    def peak_with(self, held: int, remaining: int) -> int:
        """The peak if this sequence joined.

        Sequences before its place outlive it, so their terms stay the same. To each term behind its place, the sequence
        adds the slots that it holds and one slot per step.
        """
        place = self._place(remaining)
        before = self._terms[:place].max(initial=0)
        behind = (self._terms[place:] - self._negative[place:]).max(initial=0) + held
        own = remaining * (place + 1) + self._held_sums[place] + held
        return int(max(before, own, behind))

    def add(self, held: int, remaining: int) -> None:
        """Add a sequence to the forecast."""
        place = self._place(remaining)
        self._held_sums = _extended(self._held_sums, place, self._held_sums[place])
        self._held_sums[place + 1 :] += held
        self._negative = _extended(self._negative, place, -remaining)
        self._terms = self._make_terms()

    def _make_terms(self) -> NDArray[np.int64]:
        """[n] the slots that all sequences hold when each takes its last one."""
        terms: NDArray[np.int64] = self._held_sums[1:] - self._negative * np.arange(1, len(self._negative) + 1)
        return terms

    def _place(self, remaining: int) -> int:
        return int(self._negative.searchsorted(-remaining, side="right"))


def _extended(values: NDArray[np.int64], place: int, value: int) -> NDArray[np.int64]:
    """`values` with `value` inserted at `place`; np.insert is several times as slow."""
    extended = np.empty(len(values) + 1, dtype=np.int64)
    extended[:place], extended[place], extended[place + 1 :] = values[:place], value, values[place:]
    return extended


class Gate:
    """Decides which candidates may join the running sequences in one step."""

    def __init__(self, policy: AdmissionPolicy, running: Demand) -> None:
        self._policy = policy
        self._is_occupied = len(running.held) > 0
        self._forecasts = [Forecast(running.held, remaining) for remaining in policy.steps_left(running)]

    def admits(self, candidate: Demand, capacity: int) -> bool:
        """Whether the candidate fits in every draw; if it does, it counts as running. A lone candidate always fits."""
        usable = self._policy.usable(capacity)
        held = int(candidate.held[0])
        remaining = self._policy.steps_left(candidate)[:, 0].tolist()
        pairs = list(zip(self._forecasts, remaining, strict=True))
        if self._is_occupied and any(forecast.peak_with(held, left) > usable for forecast, left in pairs):
            return False
        for forecast, left in pairs:
            forecast.add(held, left)
        self._is_occupied = True
        return True
