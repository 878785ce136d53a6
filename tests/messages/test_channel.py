# SPDX-License-Identifier: Apache-2.0
"""Channels over real Unix sockets."""

import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import pytest

from lightllm_backend.messages import channel as channel_module
from lightllm_backend.messages.channel import Channel, ChannelClosed, Message, Unread, listen


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
    assert list(far.receive_available()) == []
    large = list(range(20000))
    sender = threading.Thread(target=lambda: (near.send(Note("a")), near.send(Note(large))))
    sender.start()
    assert far.receive() == Note("a")
    assert far.receive() == Note(large)
    sender.join()
    near.close()
    for receive in (lambda: list(far.receive_available()), far.receive):
        with pytest.raises(ChannelClosed):
            receive()
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
    reader.join(60)
    assert len(seen) == 1
    near.close()  # once more is no error
    with pytest.raises(ChannelClosed):
        for _ in range(100):  # the first may still go into the socket's buffer
            far.send(Note(0))
    far.close()


class SlowSocket:
    """A socket with another method in place of one of its own."""

    def __init__(self, connection: socket.socket, name: str, method: Any) -> None:
        self._connection = connection
        setattr(self, name, method)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)


@pytest.mark.parametrize("use", ["send", "receive"])
def test_nobody_uses_a_socket_that_is_closed(address: str, use: str) -> None:
    """A thread that is in the middle of it, and not blocked yet, has left before the number may be another file's."""
    near, far = connected(address)
    connection = near._socket
    name = {"send": "sendmsg", "receive": "recv"}[use]
    begun, closed, ended = threading.Event(), [], []
    original = getattr(connection, name)

    def slow(*arguments: Any) -> Any:
        begun.set()
        time.sleep(0.2)
        closed.append(connection.fileno() < 0)
        return original(*arguments)

    near._socket = SlowSocket(connection, name, slow)

    def run() -> None:
        try:
            near.send(Note(0)) if use == "send" else near.receive()
        except Exception as error:  # noqa: BLE001 - whatever it is, it is to be seen
            ended.append(type(error))

    thread = threading.Thread(target=run)
    thread.start()
    assert begun.wait(60)
    near.close()
    thread.join(60)
    assert (closed, connection.fileno() < 0, ended) == ([False], True, [ChannelClosed])
    far.close()


def test_a_sender_does_not_wait_for_who_does_not_read_and_everything_arrives(address: str) -> None:
    near, far = connected(address)
    notes = [Note(f"{number}" * 3000) for number in range(300)]  # some 2 MB, ten times what the socket takes
    began = time.monotonic()
    for note in notes:
        near.send(note)
    assert time.monotonic() - began < 5
    assert near.num_unsent > 1 << 20
    assert near.unread_seconds > 0
    near.flush(0.01)
    assert near.num_unsent, "nobody reads"
    senders = [thread for thread in threading.enumerate() if thread.name == "channel"]
    assert len(senders) == 1
    assert [far.receive() for _ in notes] == notes
    near.flush(5)
    assert (near.num_unsent, near.unread_seconds) == (0, 0.0)
    senders[0].join(60)
    assert not senders[0].is_alive()
    near.send(Note("later"))
    assert far.receive() == Note("later")
    near.close()
    far.close()


def test_who_leaves_too_much_unread_is_cut_off(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_module, "MAX_UNSENT_BYTES", 1 << 20)
    near, far = connected(address)
    with pytest.raises(Unread, match=r"\d{7} bytes are unread; at most 1048576 may be"):
        for _ in range(100):
            near.send(Note("x" * 50_000))
    assert near.num_unsent == 0
    with pytest.raises(ChannelClosed):
        near.send(Note("more"))
    with pytest.raises(ChannelClosed):
        while True:
            far.receive()
    near.close()
    far.close()


def test_flush_does_not_wait_for_who_is_gone(address: str) -> None:
    near, far = connected(address)
    near.send(Note("x" * 1_000_000))
    began = time.monotonic()
    flusher = threading.Thread(target=near.flush, args=(30,))
    flusher.start()
    far.close()
    flusher.join(60)
    assert not flusher.is_alive()
    assert time.monotonic() - began < 10
    near.close()


def test_close_does_not_wait_for_who_does_not_read(address: str) -> None:
    near, far = connected(address)
    near.send(Note("x" * 1_000_000))
    [sender] = [thread for thread in threading.enumerate() if thread.name == "channel"]
    near.close()
    sender.join(60)
    assert not sender.is_alive()
    far.close()


def test_a_reader_does_not_wait_for_the_rest_of_a_message(address: str) -> None:
    """Its sender may have been stopped in the middle."""
    near, far = connected(address)
    near.send(Note("whole"))
    near._socket.send(b"\0\0\0\x0a1234")
    assert list(far.receive_available()) == [Note("whole")]
    assert list(far.receive_available()) == []
    near.close()
    with pytest.raises(ChannelClosed):
        list(far.receive_available())
    far.close()


def test_nobody_waits_for_a_listener_that_stands_still(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_module, "_BACKLOG", 0)
    listener = listen(address)
    first = Channel.connect(address)
    began = time.monotonic()
    with pytest.raises(ChannelClosed, match="nobody listens"):
        Channel.connect(address)
    assert time.monotonic() - began < 10
    first.close()
    listener.close()


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
