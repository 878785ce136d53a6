# SPDX-License-Identifier: Apache-2.0
"""Ways to choose a replica for a request, as proxies have them.

- `random`: any replica;
- `least loaded`: the one with the fewest requests that have not ended, by chance among several;
- `prefix hash`: consistent hashing on a key that all requests with the same beginning share;
- `both`: the same, but a replica takes no more than LOAD_FACTOR times its share of the requests, and the next one on
  the ring takes the rest (Mirrokni, Thorup and Zadimoghaddam, "Consistent Hashing with Bounded Loads", 2018), as
  HAProxy's `hash-balance-factor` and Envoy's `hash_balance_factor` do.
"""

from __future__ import annotations

import math
import random
from bisect import bisect
from collections.abc import Sequence
from hashlib import blake2b

POLICIES = ("random", "least loaded", "prefix hash", "both")
POINTS = 160  # of a replica on the ring
LOAD_FACTOR = 1.25


class ReplicaChoice:
    """Chooses a replica by a request's key and the requests that each replica has."""

    def __init__(self, policy: str, num_replicas: int, seed: int = 0) -> None:
        """policy: one of POLICIES."""
        self._policy = policy
        self._rng = random.Random(seed)
        # Each replica owns the arcs of the ring that end in its points.
        points = [(_hash(f"{replica} {point}"), replica) for replica in range(num_replicas) for point in range(POINTS)]
        self._ends, self._owners = zip(*sorted(points), strict=True)

    def __call__(self, key: str, loads: Sequence[int]) -> int:
        if self._policy == "random":
            return self._rng.randrange(len(loads))
        if self._policy == "least loaded":
            least = min(loads)
            return self._rng.choice([replica for replica, load in enumerate(loads) if load == least])
        most = math.ceil(LOAD_FACTOR * (sum(loads) + 1) / len(loads)) if self._policy == "both" else math.inf
        place = bisect(self._ends, _hash(key)) % len(self._ends)
        while loads[self._owners[place]] >= most:
            place = (place + 1) % len(self._ends)
        return int(self._owners[place])


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")
