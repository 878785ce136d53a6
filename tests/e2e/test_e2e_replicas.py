# SPDX-License-Identifier: Apache-2.0
"""Two replicas behind HAProxy, as deploy/proxy/haproxy.cfg configures it: `python -m perf.replicas chaos` does more."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from lightllm_client import LightLLMClient
from perf.replicas.chaos import Chaos
from perf.replicas.clients import Clients
from perf.replicas.fleet import Fleet, haproxy, running_fleet, sleeping_settings
from tests.polling import poll

pytestmark = pytest.mark.skipif(haproxy() is None, reason="haproxy is not installed")

WAIT = 120.0  # seconds; reached only by a failure


async def chaos(fleet: Fleet) -> tuple[int, Chaos]:
    first, second = fleet.replicas[:2]
    clients = Clients(fleet.proxy.grpc_url, None, concurrency=6, max_tokens=20)
    one = Chaos(fleet, clients)
    await clients.start()
    try:
        first.worker().suspend()  # what it has now cannot end before the kill
        assert await asyncio.to_thread(poll, lambda: fleet.proxy.sessions(first.name))
        await one.kill(first)
        await one.rest("without the killed one", 0.5)
        assert fleet.proxy.failures(first.name), "the kill hit nobody"
        await one.start("the killed one is started again", [first])
        code = await one.replace(second, start=False)
        await one.rest("without the drained one", 0.5)
    finally:
        await clients.stop()
    return code, one


def check_placement(fleet: Fleet) -> None:
    """Requests with the same key go to one replica, those without a key to both by turns."""
    with LightLLMClient(fleet.proxy.grpc_url, timeout=WAIT) as client:
        for key in ("a session", "a session", "a session", None, None):
            client.generate("Once upon a time", max_tokens=2, ignore_eos=True, prefix_key=key)
    assert sorted(fleet.proxy.requests("grpc_by_prefix").values()) == [0, 0, 0, 3]
    assert sorted(fleet.proxy.requests("grpc").values()) == [0, 0, 1, 1]


def test_no_request_is_lost_when_a_replica_is_killed_and_one_is_drained(tmp_path: Path) -> None:
    with running_fleet(sleeping_settings(tmp_path, slowdown=8.0), tmp_path, front=False) as fleet:
        fleet.start(fleet.replicas[:2])
        check_placement(fleet)
        code, one = asyncio.run(chaos(fleet))
    assert [lost for phase in one.phases for lost in phase.tally.lost] == []
    _, without, _, drained, _ = (phase.tally for phase in one.phases)
    assert without.done
    assert code == 0
    assert (drained.retries, drained.told) == (0, {})
