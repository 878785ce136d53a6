# SPDX-License-Identifier: Apache-2.0
"""Messages over real Unix sockets, what they carry, and the run directory in which models meet."""

import os
import threading
import time
from pathlib import Path
from typing import Any

import msgpack
import psutil
import pytest

from lightllm_backend.messages import channel
from lightllm_backend.messages.channel import (
    Channel,
    ChannelClosed,
    leave_run_directory,
    listen,
    pack_chunk,
    pack_request,
    remove_stale_run_directories,
    run_directory,
    run_directory_of,
    unpack_chunk,
    unpack_request,
)
from lightllm_backend.request import FinishReason, Request, RequestError, SamplingParams, TokenChunk


def over_the_wire(packed: list[Any]) -> list[Any]:
    unpacked: list[Any] = msgpack.unpackb(msgpack.packb(packed))
    return unpacked


@pytest.mark.parametrize(
    "request_",
    [
        Request("u", (1, 2, 3), SamplingParams()),
        Request(
            "ü-1",
            (0, 2**31 - 1),
            SamplingParams(
                max_tokens=7, do_sample=True, temperature=0.5, top_p=0.25, top_k=3, presence_penalty=-1.0,
                frequency_penalty=0.5, repetition_penalty=2.0, seed=2**64 - 1, min_tokens=2, ignore_eos=True,
                stop_words=("a", "🎉"), return_log_probs=True,
            ),
            deadline=12.5,
            urgent=True,
        ),
    ],
)  # fmt: skip
def test_a_request_arrives_as_it_was(request_: Request) -> None:
    assert unpack_request(over_the_wire(pack_request(request_))) == request_


@pytest.mark.parametrize(
    "chunk",
    [
        TokenChunk("u", [1, 2], [-0.5, -1.25], None, 5, 0.25),
        TokenChunk("u", [], [], FinishReason.LENGTH, 5),
        TokenChunk("u", [7], [], FinishReason.STOP),
    ],
)
def test_a_chunk_arrives_as_it_was(chunk: TokenChunk) -> None:
    assert unpack_chunk(over_the_wire(pack_chunk(chunk))) == chunk


def test_a_chunk_s_error_arrives_with_its_code() -> None:
    sent = TokenChunk("u", [], [], FinishReason.CANCELLED, error=RequestError("CANCELLED", "the deadline: passed"))
    arrived = unpack_chunk(over_the_wire(pack_chunk(sent)))
    assert arrived.error is not None
    assert (arrived.error.code, arrived.error.message) == ("CANCELLED", "the deadline: passed")
    assert arrived.finish_reason is FinishReason.CANCELLED


# Sockets


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
    sender = threading.Thread(target=lambda: (near.send(0, "a"), near.send(1, large)))
    sender.start()
    assert far.receive() == [0, "a"]
    assert far.receive() == [1, large]
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
            far.send(0)
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
            near.send(0) if use == "send" else near.receive()
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
    near.send(5)
    assert far.receive() == [5]
    near.close()
    far.close()


# The run directory


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("LIGHTLLM_RUN_DIR", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / f"lightllm-{os.getuid()}"


def test_it_is_private_and_the_same_for_all_children_of_one_server(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = os.getppid()
    assert run_directory() == run_directory_of(server)
    assert run_directory().parent == base
    assert run_directory().stat().st_mode & 0o777 == base.stat().st_mode & 0o777 == 0o700
    assert run_directory_of(os.getpid()) != run_directory_of(server), "two servers do not meet"


def test_a_pid_that_is_used_again_is_another_server(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = run_directory()
    created = psutil.Process(os.getppid()).create_time()
    monkeypatch.setattr(channel.psutil.Process, "create_time", lambda self: created + 100)
    assert run_directory() != before


def test_a_directory_that_others_may_use_is_refused(base: Path) -> None:
    base.mkdir()
    base.chmod(0o755)
    with pytest.raises(PermissionError, match="only this user"):
        run_directory()


def test_a_link_in_its_place_is_refused(base: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    base.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PermissionError):
        run_directory()


def test_the_last_to_leave_it_removes_it(base: Path) -> None:
    (run_directory() / "engine").touch()
    leave_run_directory()
    assert (run_directory() / "engine").exists(), "somebody is still there"
    (run_directory() / "engine").unlink()
    leave_run_directory()
    assert list(base.iterdir()) == []
    leave_run_directory()  # it is made again, and gone again
    assert list(base.iterdir()) == []


def test_the_environment_may_name_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTLLM_RUN_DIR", str(tmp_path / "a" / "b"))
    assert run_directory() == run_directory_of(1) == tmp_path / "a" / "b"
    assert run_directory().is_dir()
    remove_stale_run_directories()
    leave_run_directory()
    assert (tmp_path / "a" / "b").is_dir(), "whoever names it removes it"


def test_what_dead_servers_left_is_removed_and_nothing_else(base: Path) -> None:
    own, other = run_directory(), run_directory_of(os.getpid())
    reused = base / f"{os.getpid()}-12345"  # the pid lives, but it is another process
    dead = base / "4999999-12345"
    for directory in (reused, dead):
        directory.mkdir()
        (directory / "engine").touch()
    foreign = base / "notes"
    foreign.mkdir()
    remove_stale_run_directories()
    assert {path.name for path in base.iterdir()} == {own.name, other.name, foreign.name}
