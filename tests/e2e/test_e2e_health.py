# SPDX-License-Identifier: Apache-2.0
"""The launch command under a flood of requests leaves a busy server alone."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightllm_client import LightLLMClient
from tests.e2e.launch_command import LaunchCommand, flood

pytestmark = pytest.mark.e2e

PROBE_SECONDS = 2.5  # within two seconds a busy step may take nothing for want of a core


@pytest.fixture
def command(tmp_path: Path) -> Iterator[LaunchCommand]:
    started = LaunchCommand(tmp_path, PROBE_SECONDS, max_queue_size=200)
    try:
        yield started.wait_ready()
    finally:
        started.stop()


def test_a_flood_does_not_take_a_healthy_server_down(command: LaunchCommand) -> None:
    """More at once than the queue holds, over and over, until several probes have come and gone."""
    started = time.monotonic()
    ends = Counter[str]()
    while time.monotonic() < started + 4 * PROBE_SECONDS:
        ends += asyncio.run(flood(command.http_port, 450, max_tokens=2, seconds=60))
    assert ends["200"] >= 200, ends  # that each has an answer is test_e2e_overload.py's to prove
    assert command.process.poll() is None, command.log()
    assert "error" not in command.log()
    with LightLLMClient(command.grpc_url, timeout=60) as client:
        client.health()
        assert client.generate("The capital of Japan is", max_tokens=1).text == " Tokyo"
