# SPDX-License-Identifier: Apache-2.0
"""What is done to a fleet under load, and what came of the requests meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from typing import Any

from perf.replicas.clients import Clients, Tally
from perf.replicas.fleet import Fleet, Replica, wait_until


@dataclass
class Phase:
    """One thing that was done under load, and how the requests ended that did so meanwhile."""

    name: str
    seconds: float
    tally: Tally
    repeated: int = 0  # requests, by the proxy
    ejected_seconds: float | None = None  # from the fault until the proxy sent nothing more

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "tally": {**asdict(self.tally), "told": dict(self.tally.told)}}


class Chaos:
    """Changes to the fleet while clients ask. Blocking work runs in threads, beside the clients."""

    def __init__(self, fleet: Fleet, clients: Clients) -> None:
        self._fleet, self._clients = fleet, clients
        self.phases: list[Phase] = []

    @contextlib.asynccontextmanager
    async def phase(self, name: str) -> AsyncIterator[Phase]:
        """Count anew while the block runs. What ends later counts in the next phase."""
        self._clients.tally = Tally()
        began, repeated = time.monotonic(), self._fleet.proxy.repeated()
        one = Phase(name, 0.0, self._clients.tally)
        self.phases.append(one)
        yield one
        one.seconds = time.monotonic() - began
        one.repeated = self._fleet.proxy.repeated() - repeated
        print(f"{name}: {one.seconds:.1f} s, {one.tally.done} answered, {len(one.tally.lost)} lost", flush=True)

    async def rest(self, name: str, seconds: float) -> None:
        """Change nothing, until at least one request has been answered."""
        async with self.phase(name) as one:
            await asyncio.sleep(seconds)
            while not one.tally.done and not one.tally.lost:
                await asyncio.sleep(0.05)

    async def start(self, name: str, replicas: list[Replica]) -> None:
        async with self.phase(name):
            await asyncio.to_thread(self._fleet.start, replicas)

    async def kill(self, replica: Replica, name: str = "a replica is killed") -> None:
        """Kill a replica's processes and wait until the proxy has ejected it."""
        async with self.phase(name) as one:
            began = time.monotonic()
            await asyncio.to_thread(replica.kill)
            await asyncio.to_thread(self._wait_down, replica)
            one.ejected_seconds = time.monotonic() - began

    async def terminate(self, replica: Replica, name: str = "a replica gets SIGTERM, undrained") -> int:
        async with self.phase(name):
            code = await asyncio.to_thread(replica.stop)
            await asyncio.to_thread(self._wait_down, replica)
            return code

    async def replace(self, replica: Replica, start: bool = True) -> int:
        """Drain a replica, stop it, and start it again if `start` says so; return its exit code."""
        proxy = self._fleet.proxy
        async with self.phase(f"{replica.name} is drained and {'replaced' if start else 'stopped'}"):
            await asyncio.to_thread(proxy.drain, replica.name)
            code = await asyncio.to_thread(replica.stop)
            await asyncio.to_thread(self._wait_down, replica)
            proxy.undrain(replica.name)
            if start:
                await asyncio.to_thread(self._fleet.start, [replica])
        return code

    def _wait_down(self, replica: Replica) -> None:
        proxy = self._fleet.proxy
        wait_until(lambda: proxy.is_down(replica.name), f"the proxy has ejected {replica.name}", 60.0)
