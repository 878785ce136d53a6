# SPDX-License-Identifier: Apache-2.0
"""How full the KV pool will get, known or estimated before a sequence is let in.

From step to step each sequence takes one more token slot until it ends and gives all of them back. Between two ends the
demand only grows, so its peak lies at a step in which some sequence takes its last slot. With the sequences sorted by
the steps that they have left, longest first, those still alive when sequence i ends are 1 … i, and each has by then
taken as many more slots as i has steps left:

    peak = max over i of (remaining_i · i + held_1 + … + held_i)

How many steps a sequence has left is a policy's matter: at most as many as it asks for (exact), or as many as the
recent past makes likely (past_future.py).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from lightllm_backend.router.sequence import Sequence


class Demand(NamedTuple):
    """Of n sequences: an array a fact."""

    held: NDArray[np.int64]  # [n] token slots now
    remaining: NDArray[np.int64]  # [n] slots that each will take at most, one a step
    num_generated: NDArray[np.int64]  # [n] tokens generated so far; all but one of `max_tokens` where no EOS can end it
    max_tokens: NDArray[np.int64]  # [n] tokens that it may generate in all
    quantiles: NDArray[np.float64]  # [n, draws] what the policy has drawn for it


def candidate_demand(sequence: Sequence, planned: int, num_shared: int, batch_max_tokens: int) -> Demand:
    """Of a sequence, once `planned` of the tokens are that it has to prefill; without the slots that others hold too.

    What is left of them takes k more steps of at least one token each. So it never holds more than a sequence that held
    k slots less than all of them now and took one in each of them, and holds as many from then on.
    """
    steps = -(-(sequence.known_length - planned) // batch_max_tokens)
    sampling, made = sequence.request.sampling, sequence.num_generated
    return Demand(
        held=np.array([sequence.known_length - num_shared - steps]),
        remaining=np.array([sampling.max_tokens - made - 1 + steps]),
        num_generated=np.array([sampling.max_tokens - 1 if sampling.ignore_eos else made]),
        max_tokens=np.array([sampling.max_tokens]),
        quantiles=sequence.quantiles[np.newaxis],
    )


class AdmissionPolicy(Protocol):
    """Whose estimate of the steps to come counts."""

    def draw_quantiles(self) -> NDArray[np.float64]:
        """The quantiles of a new sequence, [draws]; it keeps it."""

    def steps_left(self, demand: Demand) -> NDArray[np.int64]:
        """Estimates of the steps that each sequence has left, [draws, n]. All of them must fit."""

    def usable(self, capacity: int) -> int:
        """Of the pool's slots, those that may be planned for."""

    def ended(self, length: int) -> None:
        """A sequence that was free to end has ended with this many tokens."""


class ExactAdmission:
    """Everybody may take all that it asks for, so that nobody is ever in need."""

    def draw_quantiles(self) -> NDArray[np.float64]:
        return np.zeros(1)

    def steps_left(self, demand: Demand) -> NDArray[np.int64]:
        return demand.remaining[np.newaxis]

    def usable(self, capacity: int) -> int:
        return capacity

    def ended(self, length: int) -> None:
        pass


class Forecast:
    """The most token slots that some sequences will hold at once, now or later, and with whom it would be how many."""

    def __init__(self, held: NDArray[np.int64], remaining: NDArray[np.int64]) -> None:
        """held [n]: token slots now; remaining [n]: slots that each will still take, one a step."""
        negative = -remaining
        longest_first = np.argsort(negative)
        self._negative = negative[longest_first]  # [n] remaining, with the sign that makes it ascend
        self._held_sums = np.zeros(len(held) + 1, dtype=np.int64)  # of those before each place
        np.cumsum(held[longest_first], out=self._held_sums[1:])
        self._terms = self._make_terms()

    @property
    def peak(self) -> int:
        return int(self._terms.max(initial=0))

    def peak_with(self, held: int, remaining: int) -> int:
        """The peak if this sequence joined.

        The terms before its place stay as they are, since it has ended by then. To those behind it adds what it holds,
        and a slot for each step.
        """
        place = self._place(remaining)
        before = self._terms[:place].max(initial=0)
        behind = (self._terms[place:] - self._negative[place:]).max(initial=0) + held
        own = remaining * (place + 1) + self._held_sums[place] + held
        return int(max(before, own, behind))

    def add(self, held: int, remaining: int) -> None:
        """It has joined."""
        place = self._place(remaining)
        self._held_sums = _extended(self._held_sums, place, self._held_sums[place])
        self._held_sums[place + 1 :] += held
        self._negative = _extended(self._negative, place, -remaining)
        self._terms = self._make_terms()

    def _make_terms(self) -> NDArray[np.int64]:
        """[n] the slots that are held when each sequence takes its last."""
        terms: NDArray[np.int64] = self._held_sums[1:] - self._negative * np.arange(1, len(self._negative) + 1)
        return terms

    def _place(self, remaining: int) -> int:
        return int(self._negative.searchsorted(-remaining, side="right"))


def _extended(values: NDArray[np.int64], place: int, value: int) -> NDArray[np.int64]:
    """With one value more; several times as fast as np.insert."""
    extended = np.empty(len(values) + 1, dtype=np.int64)
    extended[:place], extended[place], extended[place + 1 :] = values[:place], value, values[place:]
    return extended


class Gate:
    """Who may join the running sequences in one step."""

    def __init__(self, policy: AdmissionPolicy, running: Demand) -> None:
        self._policy = policy
        self._anybody = len(running.held) > 0
        self._forecasts = [Forecast(running.held, remaining) for remaining in policy.steps_left(running)]

    def admits(self, candidate: Demand, capacity: int) -> bool:
        """Whether there is room for it, in every estimate; it counts from then on. Alone, it always has room."""
        usable = self._policy.usable(capacity)
        held = int(candidate.held[0])
        remaining = self._policy.steps_left(candidate)[:, 0].tolist()
        pairs = list(zip(self._forecasts, remaining, strict=True))
        if self._anybody and any(forecast.peak_with(held, left) > usable for forecast, left in pairs):
            return False
        for forecast, left in pairs:
            forecast.add(held, left)
        self._anybody = True
        return True
