# SPDX-License-Identifier: Apache-2.0
"""Channels over real Unix sockets."""

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import pytest

from lightllm_backend.messages.channel import Channel, ChannelClosed, Message, listen


@dataclass
class Note(Message):
    text: Any


@pytest.fixture
def address(tmp_path: Path) -> str:
    return str(tmp_path / "s")


def connected(address: str) -> tuple[Channel, Channel]:
    listener = listen(address)
    near = Channel.connect(address)
    far = Channel.accept(listener)
    listener.close()
    return near, far


def test_messages_come_in_order_and_whole(address: str) -> None:
    near, far = connected(address)
    assert not far.has_message()
    large = list(range(20000))
    sender = threading.Thread(target=lambda: (near.send(Note("a")), near.send(Note(large))))
    sender.start()
    assert far.receive() == Note("a")
    assert far.receive() == Note(large)
    sender.join()
    near.close()
    assert far.has_message(), "the end counts as something to receive"
    with pytest.raises(ChannelClosed):
        far.receive()
    far.close()


def test_close_wakes_the_thread_that_receives(address: str) -> None:
    near, far = connected(address)
    seen: list[Exception] = []

    def receive() -> None:
        try:
            near.receive()
        except ChannelClosed as error:
            seen.append(error)

    reader = threading.Thread(target=receive)
    reader.start()
    near.close()
    reader.join(5)
    assert len(seen) == 1
    near.close()  # once more is no error
    with pytest.raises(ChannelClosed):
        for _ in range(100):  # the first may still go into the socket's buffer
            far.send(Note(0))
    far.close()


@pytest.mark.parametrize("use", ["send", "receive"])
def test_nobody_uses_a_socket_that_is_closed(address: str, use: str) -> None:
    """A thread that is in the middle of it, and not blocked yet, has left before the number may be another file's."""
    near, far = connected(address)
    connection = near._connection
    name = {"send": "send_bytes", "receive": "recv_bytes"}[use]
    begun, closed, ended = threading.Event(), [], []
    original = getattr(connection, name)

    def slow(*arguments: Any) -> Any:
        begun.set()
        time.sleep(0.2)
        closed.append(connection.closed)
        return original(*arguments)

    setattr(connection, name, slow)

    def run() -> None:
        try:
            near.send(Note(0)) if use == "send" else near.receive()
        except Exception as error:  # noqa: BLE001 - whatever it is, it is to be seen
            ended.append(type(error))

    thread = threading.Thread(target=run)
    thread.start()
    assert begun.wait(5)
    near.close()
    thread.join(5)
    assert (closed, connection.closed, ended) == ([False], True, [ChannelClosed])
    far.close()


def test_nobody_listens(address: str) -> None:
    with pytest.raises(ChannelClosed, match="nobody listens"):
        Channel.connect(address)


def test_a_socket_that_a_dead_process_left_is_replaced(address: str) -> None:
    Path(address).touch()
    near, far = connected(address)
    near.send(Note(5))
    assert far.receive() == Note(5)
    near.close()
    far.close()


def test_a_frame_that_makes_no_sense_raises_and_the_next_one_is_received(address: str) -> None:
    near, far = connected(address)
    for frame in (("Nothing", [1]), ("Note", [1, 2]), 7):
        near.send_frame(msgpack.packb(frame))
        with pytest.raises((KeyError, TypeError)):
            far.receive()
    near.send(Note(1))
    assert far.receive() == Note(1)
    near.close()
    far.close()


def test_no_two_messages_have_one_name() -> None:
    with pytest.raises(AssertionError, match="two messages are called Note"):
        type("Note", (Message,), {})
