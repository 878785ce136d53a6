# SPDX-License-Identifier: Apache-2.0
"""HTTP clients that read nothing are disconnected by the system, through an option on the server's listening socket."""

from __future__ import annotations

import select
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from lightllm_backend.launch.slow_readers import limit_unread_seconds

# Sends without end to each of two connections, and says how each ends.
SERVER = """
import socket, threading
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)

def send(connection, name):
    try:
        while True:
            connection.sendall(bytes(100_000))
    except OSError as error:
        print(name, type(error).__name__, flush=True)

while True:
    connection, _ = listener.accept()
    name = connection.recv(100).decode()
    threading.Thread(target=send, args=(connection, name), daemon=True).start()
"""


@pytest.fixture
def server() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def test_who_reads_nothing_is_disconnected_and_who_reads_is_not(server: subprocess.Popen[str]) -> None:
    assert server.stdout
    port = int(server.stdout.readline())
    limit_unread_seconds(server.pid, port, 0.5)
    with (
        socket.create_connection(("127.0.0.1", port)) as stuck,
        socket.create_connection(("127.0.0.1", port)) as reading,
    ):
        for connection, name in ((stuck, b"stuck"), (reading, b"reading")):
            connection.sendall(name)
        while not select.select([server.stdout], [], [], 0)[0]:
            assert reading.recv(1 << 20), "it goes on"
        assert server.stdout.readline() == "stuck TimeoutError\n"
        for _ in range(10):
            assert reading.recv(1 << 20)


def test_nobody_listens(server: subprocess.Popen[str]) -> None:
    with pytest.raises(OSError, match=r"process \d+ does not listen at port 1"):
        limit_unread_seconds(server.pid, 1, 0.5)
