# SPDX-License-Identifier: Apache-2.0
"""What the launch command sets on a server's sockets, with stand-ins for the server."""

from __future__ import annotations

import select
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from lightllm_backend.launch import http_sockets
from lightllm_backend.launch.http_sockets import enlarge_message_buffers, limit_unread_seconds

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

# For each line that it gets, sends messages as Triton server does until one is not taken, and says how many were.
PAIR = """
import socket
reader, writer = socket.socketpair()
reader.setblocking(False)
writer.setblocking(False)
while True:
    input()
    taken = 0
    try:
        while True:
            taken += writer.send(bytes(17)) // 17
    except BlockingIOError:
        print(taken, flush=True)
    for _ in range(taken):
        reader.recv(17)
"""


def start(program: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def server() -> Iterator[subprocess.Popen[str]]:
    with start(SERVER) as process:
        yield process
        process.kill()


@pytest.fixture
def pair() -> Iterator[subprocess.Popen[str]]:
    with start(PAIR) as process:
        yield process
        process.kill()


def taken(pair: subprocess.Popen[str]) -> int:
    assert pair.stdin
    assert pair.stdout
    pair.stdin.write("\n")
    pair.stdin.flush()
    return int(pair.stdout.readline())


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


def test_more_messages_fit(pair: subprocess.Popen[str]) -> None:
    before = taken(pair)
    messages = enlarge_message_buffers(pair.pid)
    assert messages is not None
    assert before < messages <= taken(pair)


def test_a_buffer_that_is_larger_than_the_system_allows_stays(
    pair: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = taken(pair)
    monkeypatch.setattr(http_sockets, "MESSAGE_BUFFER", 1 << 12)
    messages = enlarge_message_buffers(pair.pid)
    assert messages is not None
    assert messages <= before == taken(pair)


def test_a_server_without_pairs_needs_no_larger_buffers(server: subprocess.Popen[str]) -> None:
    assert server.stdout
    server.stdout.readline()
    assert enlarge_message_buffers(server.pid) is None
