# SPDX-License-Identifier: Apache-2.0
"""Bodies that are too large, over real connections: the client sees the answer, and the server stops reading."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from lightllm_backend.config import EngineConfig
from lightllm_backend.front import request_body
from lightllm_backend.front.application import make_application
from lightllm_backend.front.main import server_of
from lightllm_backend.front.state import Front

MAX_BODY_BYTES = 1 << 20
BODY = b"a" * 9_000_000
KEY = "secret"
HEADERS = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
TOLD = f"the body is too large; allowed: at most {MAX_BODY_BYTES} bytes (max_body_bytes)"
BEGINNING = (
    b"POST /v1/completions HTTP/1.1\r\nhost: front\r\nauthorization: Bearer secret\r\ncontent-length: 9000000\r\n\r\n"
)


@pytest.fixture
def address(front: Front) -> Iterator[tuple[str, int]]:
    config = EngineConfig(max_body_bytes=MAX_BODY_BYTES)
    server = server_of(make_application(replace(front, config=config), (KEY,)), config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        yield listening.getsockname()
        server.should_exit = True
        thread.join()


def test_other_answers_are_seen_too_though_the_client_wants_the_connection_closed(
    address: tuple[str, int],
) -> None:
    """As nginx 1.22 does by default, which makes a 502 of a reset."""
    for _ in range(5):
        connection = http.client.HTTPConnection(*address, timeout=20)
        headers = {"connection": "close", "authorization": "Bearer wrong"}
        connection.request("POST", "/v1/completions", BODY, headers)
        response = connection.getresponse()
        assert response.status == 401
        assert b"the API key" in response.read()


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_client_that_sends_all_before_it_reads_sees_the_refusal(address: tuple[str, int], is_chunked: bool) -> None:
    connection = http.client.HTTPConnection(*address, timeout=20)
    for _ in range(5):  # whether a reset comes before the answer is read is a matter of time
        body = iter([BODY[i : i + 500_000] for i in range(0, len(BODY), 500_000)]) if is_chunked else BODY
        connection.request("POST", "/v1/completions", body, HEADERS, encode_chunked=is_chunked)
        response = connection.getresponse()
        assert response.status == 413
        assert response.getheader("connection") == "close"
        assert TOLD in response.read().decode()


def test_the_answer_comes_before_the_body(address: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that waits with its body is refused at once, and let go after a while."""
    monkeypatch.setattr(request_body, "MAX_IDLE_SECONDS", 0.5)
    with socket.create_connection(address, timeout=20) as connection:
        connection.sendall(BEGINNING)
        started = time.monotonic()
        received = connection.recv(4096)
        assert time.monotonic() - started < 0.5
        while part := connection.recv(4096):
            received += part
        assert 0.5 <= time.monotonic() - started < 10
    assert received.startswith(b"HTTP/1.1 413 ")
    assert TOLD.encode() in received


def test_a_body_without_an_end_is_not_read_forever(address: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_body, "MAX_DROPPING_SECONDS", 1.0)
    with socket.create_connection(address, timeout=20) as connection:
        connection.sendall(BEGINNING)
        started = time.monotonic()
        with pytest.raises(ConnectionError):
            while time.monotonic() - started < 15:
                connection.sendall(b"a")
                time.sleep(0.01)
    assert time.monotonic() - started >= 1
