# SPDX-License-Identifier: Apache-2.0
"""Two replicas behind HAProxy, as deploy/proxy/haproxy.cfg configures it: `python -m perf.replicas chaos` does more."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from lightllm_client import LightLLMClient
from perf.replicas.chaos import Chaos
from perf.replicas.clients import Clients
from perf.replicas.fleet import Fleet, haproxy, running_fleet, sleeping_settings
from tests.polling import poll

pytestmark = pytest.mark.skipif(haproxy() is None, reason="haproxy is not installed")

WAIT = 120.0  # seconds; reached only by a failure


async def under_load(fleet: Fleet, change: Callable[[Fleet, Chaos], Awaitable[None]]) -> Chaos:
    clients = Clients(fleet.proxy.grpc_url, None, concurrency=6, max_tokens=20)
    one = Chaos(fleet, clients)
    await clients.start()
    try:
        await change(fleet, one)
    finally:
        await clients.stop()
    assert [lost for phase in one.phases for lost in phase.tally.lost] == []
    return one


async def add_a_replica(fleet: Fleet, one: Chaos) -> None:
    await one.start("a second replica is started", [fleet.replicas[1]])


async def drain_and_kill(fleet: Fleet, one: Chaos) -> None:
    first, second = fleet.replicas[:2]
    async with one.phase("the first is drained"):
        await asyncio.to_thread(fleet.proxy.drain, first.name)
    await one.rest("the second alone", 0.5)
    fleet.proxy.undrain(first.name)
    second.worker().suspend()  # what it has now cannot end before the kill
    assert await asyncio.to_thread(poll, lambda: fleet.proxy.sessions(second.name))
    await one.kill(second)
    await one.rest("the first alone", 0.5)


def check_placement(fleet: Fleet) -> None:
    """Requests with the same key go to one replica, those without a key to both by turns."""
    backends = ("grpc_by_prefix", "grpc")
    before = [fleet.proxy.requests(backend) for backend in backends]
    with LightLLMClient(fleet.proxy.grpc_url, timeout=WAIT) as client:
        for key in ("a session", "a session", "a session", None, None):
            client.generate("Once upon a time", max_tokens=2, ignore_eos=True, prefix_key=key)
    after = [fleet.proxy.requests(backend) for backend in backends]
    keyed, others = (sorted((Counter(new) - Counter(old)).values()) for new, old in zip(after, before, strict=True))
    assert keyed == [3]
    assert others == [1, 1]


def test_no_request_is_lost_when_replicas_come_are_drained_and_killed(tmp_path: Path) -> None:
    with running_fleet(sleeping_settings(tmp_path, slowdown=20.0), tmp_path, front=False) as fleet:
        first, second = fleet.replicas[:2]
        fleet.start([first])
        asyncio.run(under_load(fleet, add_a_replica))
        check_placement(fleet)
        one = asyncio.run(under_load(fleet, drain_and_kill))
        assert second.processes() == []
        assert first.stop() == 0
    drained, second_alone, killed, first_alone = (phase.tally for phase in one.phases)
    assert (drained.retries, drained.told) == (0, {})
    assert second_alone.done
    assert first_alone.done
    repeated = sum(phase.repeated for phase in one.phases)
    assert repeated or killed.retries or first_alone.retries or killed.told or first_alone.told, "the kill hit nobody"
