# SPDX-License-Identifier: Apache-2.0
"""Admission by the lengths that answers have had lately, for clients that ask for far more tokens than they use.

After the Past-Future scheduler of Gong et al., ASPLOS 2025, arXiv 2507.10150, which LightLLM has: the length of each
answer is drawn from those of the recent past that are longer than what it has made so far, and the peak of the KV pool
is foreseen with these lengths. That is done with several draws at once, the worst of which must fit, and some of the
pool is kept in reserve. Where the future turns out longer than the past, sequences are preempted (see router.py).
"""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

from lightllm_backend.router.admission import Demand

WINDOW = 200  # answers that count as recent
DRAWS = 4
RESERVE = 0.05  # share of the pool

UNKNOWN = np.iinfo(np.int64).max


class PastFutureAdmission:
    """Owns the recent lengths and the chance, which starts alike in every process.

    A sequence draws once, which of the lengths that are possible it will have, in order of length: so it does not get
    another chance at each step that it waits. As long as the window is not full, the missing lengths count as endless.
    """

    def __init__(self) -> None:
        self._rng = np.random.default_rng(0)
        self._recent = deque([UNKNOWN] * WINDOW, maxlen=WINDOW)
        self._ascending: NDArray[np.int64] | None = None  # of `_recent` and an endless one; None: to be sorted anew

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

    def ended(self, length: int) -> None:
        self._recent.append(length)
        self._ascending = None
