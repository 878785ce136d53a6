# SPDX-License-Identifier: Apache-2.0
"""The front's processes: they share a socket, dead ones are replaced, none outlives the launch command."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightllm_backend.config import EngineConfig
from lightllm_backend.launch import fronts
from lightllm_backend.launch.fronts import Fronts, front_environment, listening_socket
from tests.free_ports import free_ports
from tests.polling import poll

# Answers each connection with its process id, and ends at the end of its standard input.
PROGRAM = """
import os, socket, sys, threading

listener = socket.socket(fileno=int(sys.argv[1]))

def serve():
    while True:
        with listener.accept()[0] as connection:
            connection.sendall(str(os.getpid()).encode())

threading.Thread(target=serve, daemon=True).start()
sys.stdin.read()
"""


class Front:
    """Two processes of a stand-in."""

    def __init__(self, code: str = PROGRAM) -> None:
        [self.port] = free_ports(1)
        self.said: list[str] = []
        config = EngineConfig(openai_port=self.port, front_processes=2)
        fronts.COMMAND = (sys.executable, "-c", code)  # type: ignore[assignment]
        self.processes = Fronts(config, dict(os.environ), self.said.append)

    def ask(self) -> int:
        """The id of the process that answers."""
        with socket.create_connection(("127.0.0.1", self.port), 20) as connection:
            return int(connection.recv(100))


@pytest.fixture
def front(monkeypatch: pytest.MonkeyPatch) -> Iterator[Front]:
    monkeypatch.setattr(fronts, "COMMAND", fronts.COMMAND)
    monkeypatch.setattr(fronts, "FIRST_PAUSE_SECONDS", 0.05)
    front = Front()
    yield front
    front.processes.stop(0.0)


def test_a_dead_process_is_replaced(front: Front) -> None:
    first = front.ask()
    os.kill(first, signal.SIGKILL)
    assert poll(lambda: any("exit code -9; another starts in" in line for line in front.said))
    assert front.ask() != first, "connections wait meanwhile, and nobody refuses them"


def test_stop_ends_all_and_closes_the_port(front: Front) -> None:
    asked = front.ask()
    front.processes.stop(20.0)
    assert not Path(f"/proc/{asked}").exists()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", front.port)) != 0
    assert front.said == []


def test_settings_that_cannot_be_served_are_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fronts, "COMMAND", fronts.COMMAND)
    front = Front("import sys; sys.exit(2)")
    assert poll(lambda: len(front.said) == 2)
    front.processes.stop(0.0)
    assert set(front.said) == {"error: the front cannot serve these settings; the line above says why"}


def test_a_process_gets_the_settings_in_effect_and_only_its_own_secret() -> None:
    config = EngineConfig(openai_port=9, tp=2)
    given = {"LIGHTLLM_API_KEY": "k", "LIGHTLLM_PROBE_KEY": "p", "LIGHTLLM_TP": "1", "HOME": "/h"}
    made = front_environment(config, Path("/m"), given)
    ours = {name: value for name, value in made.items() if name.startswith("LIGHTLLM_")}
    assert ours == {
        "LIGHTLLM_API_KEY": "k", "LIGHTLLM_OPENAI_PORT": "9", "LIGHTLLM_TP": "2", "LIGHTLLM_MODEL_DIR": "/m"
    }  # fmt: skip
    assert made["HOME"] == "/h"


def test_the_kernel_takes_little_for_a_client_that_does_not_read() -> None:
    with listening_socket("127.0.0.1", 0, 60.0) as listener, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(listener.getsockname())
        connection, _ = listener.accept()
        with connection:
            connection.setblocking(False)
            taken = 0
            with pytest.raises(BlockingIOError):
                while taken < 2**22:
                    taken += connection.send(bytes(4096))
    assert taken < 2**19
