# SPDX-License-Identifier: Apache-2.0
"""A server whose engine is on two hosts waits for a lost one, for longer than a restart would take."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from lightllm_backend.config import EngineConfig
from lightllm_client import LightLLMClient, Unavailable
from tests.e2e.launch_command import LaunchCommand
from tests.free_ports import free_ports
from tests.polling import poll
from tests.worker.process_harness import further_host, kill_all

pytestmark = [pytest.mark.e2e, pytest.mark.soak]

PROBE_SECONDS = 0.5


def test_the_server_waits_for_a_lost_host(tiny_model: Path, tmp_path: Path) -> None:
    group = {"tp": 2, "nnodes": 2, "master_addr": "127.0.0.1", "master_port": free_ports(1)[0]}
    config = EngineConfig(model_dir=str(tiny_model), dtype="float32", device="cpu", **group)
    began = time.monotonic()
    host = further_host(config, tmp_path / "host")
    command = LaunchCommand(tmp_path, PROBE_SECONDS, model_dir=tiny_model, **group)
    try:
        assert poll(lambda: "ready after" in command.log(), 600), command.log()
        assert "2 ranks on 2 hosts" in command.log()
        start_seconds = time.monotonic() - began
        server = command.find("tritonserver")
        with LightLLMClient(command.grpc_url, max_retries=0) as client:
            before = client.generate("Once", max_tokens=8)
            kill_all(host)
            assert poll(lambda: "host 1 (" in command.log(), 60), command.log()
            time.sleep(2 * start_seconds + 20 * PROBE_SECONDS)  # one host alone would have had another server by now
            assert server.is_running()
            with pytest.raises(Unavailable):
                client.generate("Once", max_tokens=8)
            host = further_host(config, tmp_path / "host")
            assert poll(lambda: "the engine serves again" in command.log(), 600), command.log()
            assert client.generate("Once", max_tokens=8) == before
        assert server.is_running()
        assert command.stop() == 0
        assert host.poll() is None
        host.terminate()
        assert host.wait(60) == 0
    finally:
        command.stop()
        if host.poll() is None:
            kill_all(host)
