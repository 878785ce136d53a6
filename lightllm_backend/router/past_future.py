# SPDX-License-Identifier: Apache-2.0
"""Admission by the recent distribution of answer lengths, for clients that ask for far more tokens than they use.

This is LightLLM's Past-Future scheduler (Gong et al., ASPLOS 2025, arXiv 2507.10150). It draws the length of each
answer from the recent lengths that exceed what the answer has so far, and forecasts the peak of the KV pool with these
lengths. It makes several draws, the worst of which must fit, and keeps a share of the pool in reserve. If answers turn
out longer than the recent ones, the Router preempts sequences (router.py).
"""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

from lightllm_backend.router.admission import Demand

# perf.admission measures how full these three fill the pool, and how many preemptions they cost.
WINDOW = 200  # answers that count as recent
DRAWS = 4
RESERVE = 0.05  # share of the pool

UNKNOWN = np.iinfo(np.int64).max


class PastFutureAdmission:
    """Owns the recent lengths, and a random generator with a fixed seed, so that runs are reproducible.

    A sequence draws its quantiles once, on arrival: fresh draws in every step would let it in at the first lucky one.
    Until the window is full, the missing lengths count as endless.
    """

    def __init__(self) -> None:
        self._rng = np.random.default_rng(0)
        self._recent = deque([UNKNOWN] * WINDOW, maxlen=WINDOW)
        self._ascending: NDArray[np.int64] | None = None  # `_recent` sorted, then UNKNOWN; None: stale

    def draw_quantiles(self) -> NDArray[np.float64]:
        return self._rng.random(DRAWS)

    def steps_left(self, demand: Demand) -> NDArray[np.int64]:
        if self._ascending is None:
            self._ascending = np.append(np.sort(np.array(self._recent)), UNKNOWN)
        shortest = np.searchsorted(self._ascending[:-1], demand.num_generated, side="right")
        chosen = shortest + (demand.quantiles.T * (WINDOW - shortest)).astype(np.int64)
        lengths: NDArray[np.int64] = np.minimum(self._ascending[chosen], demand.max_tokens)
        return demand.remaining - (demand.max_tokens - lengths)

    def usable(self, capacity: int) -> int:
        return int(capacity * (1 - RESERVE))

    def record_length(self, length: int) -> None:
        self._recent.append(length)
        self._ascending = None
