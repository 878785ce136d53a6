# SPDX-License-Identifier: Apache-2.0
"""Admission: forecasts the peak of the KV pool, and lets a sequence in only if the pool can hold that peak.

Each sequence takes one more token slot in every step until it ends, and then returns all of them. Between two ends the
demand only grows, so it peaks at a step in which some sequence takes its last slot. Sort the sequences by the steps
they have left, longest first. When sequence i takes its last slot, sequences 1 … i are alive, and each has taken
remaining_i more slots:

    peak = max over i of (remaining_i · i + held_1 + … + held_i)

If some layer groups have a window (kv_pool/layer_groups.py), a sequence takes a slot in each group until it outgrows
the window, and then in the other groups alone: WindowedForecast. The sum still only grows between two ends, among which
is the end of a prompt: its tokens have slots beyond the window, and the step after gives them back.

A policy estimates the steps that a sequence has left: all that it asks for (ExactAdmission), or what the recent past
makes likely (past_future.py).
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from lightllm_backend.kv_pool.layer_groups import ONE_GROUP, LayerGroups
from lightllm_backend.router.sequence import Sequence


class Demand(NamedTuple):
    """What n sequences hold and may still take: one array per fact."""

    held: NDArray[np.int64]  # [n] token slots now, if a group gives none back
    remaining: NDArray[np.int64]  # [n] slots that each may still take in such a group, one per step
    num_generated: NDArray[np.int64]  # [n] tokens generated so far; max_tokens - 1 if EOS cannot end the sequence
    max_tokens: NDArray[np.int64]  # [n]
    quantiles: NDArray[np.float64]  # [n, draws] of the distribution of lengths, drawn by the policy
    prefilling: NDArray[np.int64]  # [n] steps that the rest of the prompt takes


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
        prefilling=np.array([steps]),
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
    """The peak number of token slots that a set of sequences will hold, and how one more sequence would change it.

    For one group of layers, which gives nothing back.
    """

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

    def peak_with(self, held: int, remaining: int, prefilling: int = 0) -> int:  # noqa: ARG002 - all slots are kept
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


class WindowedForecast:
    """A Forecast for layer groups of which some have a window. Sequences count in tokens, their peak in slots."""

    def __init__(
        self, groups: LayerGroups, batch_max_tokens: int, tokens: NDArray[np.int64], remaining: NDArray[np.int64]
    ) -> None:
        """tokens [n]: cached now. remaining [n]: tokens that each sequence will still cache, one per step."""
        self._groups = groups
        self._batch_max_tokens = batch_max_tokens
        shortest_first = np.argsort(remaining)
        self._tokens, self._ends = tokens[shortest_first], remaining[shortest_first]
        self._terms = self._make_terms()

    @property
    def peak(self) -> int:
        return int(self._terms.max(initial=0))

    def peak_with(self, tokens: int, remaining: int, prefilling: int = 0) -> int:
        """The peak if this sequence joined, which prefills for so many steps.

        In these it may hold a step's prompt tokens beside its window: an upper bound, the only one here.
        """
        most_held = self._groups.most_held(tokens + prefilling, self._batch_max_tokens)
        surplus = most_held - int(self._groups.held(tokens + prefilling))
        terms = self._terms_with(tokens, remaining) + np.where(self._ends <= prefilling, surplus, 0)
        prefilled = self._held_at(min(prefilling, remaining), tokens) + surplus
        return int(terms.max(initial=max(prefilled, self._held_at(remaining, tokens))))

    def add(self, tokens: int, remaining: int) -> None:
        """Add a sequence to the forecast. If it still prefills, no other joins in the same step."""
        place = int(self._ends.searchsorted(remaining))
        self._terms = _extended(self._terms_with(tokens, remaining), place, self._held_at(remaining, tokens))
        self._tokens = _extended(self._tokens, place, tokens)
        self._ends = _extended(self._ends, place, remaining)

    def _terms_with(self, tokens: int, remaining: int) -> NDArray[np.int64]:
        """The terms if a sequence joined, but for its own."""
        terms: NDArray[np.int64] = self._terms + np.where(
            self._ends <= remaining, self._groups.held(tokens + self._ends), 0
        )
        return terms

    def _held_at(self, step: int, tokens: int) -> int:
        """The slots of the sequences that are alive after so many steps, and of one that has so many tokens now."""
        first = self._ends.searchsorted(step)
        return int(self._groups.held(self._tokens[first:] + step).sum() + self._groups.held(tokens + step))

    def _make_terms(self) -> NDArray[np.int64]:
        """[n] the slots that all sequences hold when each takes its last one.

        A window of w holds min(t, w) = t - max(t - w, 0) of t tokens. Sequences outgrow it at steps of their own. The
        sum of what they have outgrown it by is that of all which have done so, less that of those which have ended.
        """
        ends, groups = self._ends, self._groups
        outgrown_at = np.minimum(groups.window - self._tokens, ends)
        in_order = np.sort(outgrown_at)
        num_outgrown, num_ended = in_order.searchsorted(ends), ends.searchsorted(ends)
        by_all = ends * num_outgrown - _sums(in_order)[num_outgrown]
        by_ended = ends * num_ended - _sums(outgrown_at)[num_ended]
        token_sums = _sums(self._tokens)
        tokens = token_sums[-1] - token_sums[num_ended] + ends * (len(ends) - num_ended)
        terms: NDArray[np.int64] = groups.count * tokens - groups.num_windowed * (by_all - by_ended)
        return terms


def _sums(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """[n + 1] the sums of the values before each place."""
    sums = np.zeros(len(values) + 1, dtype=np.int64)
    np.cumsum(values, out=sums[1:])
    return sums


class Gate:
    """Decides which candidates may join the running sequences in one step."""

    def __init__(
        self,
        policy: AdmissionPolicy,
        running: Demand,
        groups: LayerGroups = ONE_GROUP,
        batch_max_tokens: int = 1,
    ) -> None:
        """batch_max_tokens: the most prompt tokens of a step, which layer groups with a window keep until the next."""
        self._policy = policy
        self._is_occupied = len(running.held) > 0
        forecast = partial(WindowedForecast, groups, batch_max_tokens) if groups.num_windowed else Forecast
        self._forecasts = [forecast(running.held, remaining) for remaining in policy.steps_left(running)]

    def admits(self, candidate: Demand, capacity: int) -> bool:
        """Whether the candidate fits in every draw; if it does, it counts as running. A lone candidate always fits."""
        usable = self._policy.usable(capacity)
        held, prefilling = int(candidate.held[0]), int(candidate.prefilling[0])
        remaining = self._policy.steps_left(candidate)[:, 0].tolist()
        pairs = list(zip(self._forecasts, remaining, strict=True))
        if self._is_occupied and any(forecast.peak_with(held, left, prefilling) > usable for forecast, left in pairs):
            return False
        for forecast, left in pairs:
            forecast.add(held, left)
        self._is_occupied = True
        return True
