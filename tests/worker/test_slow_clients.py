# SPDX-License-Identifier: Apache-2.0
"""Clients of the worker that do not read, or stand still: they cost only themselves."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from lightllm_backend.generation import engine_client as engine_client_module
from lightllm_backend.generation.engine_client import EngineClient
from lightllm_backend.messages import channel as channel_module
from lightllm_backend.messages.channel import Channel, Message, frame_of, listen
from lightllm_backend.messages.engine_messages import Cancel, Ready, Stats, Submit
from lightllm_backend.request import FinishReason, Request, RequestError, SamplingParams
from lightllm_backend.worker import server as server_module
from tests.polling import poll
from tests.worker.engine_harness import INFO, Answer, counting_engine

NUM_STREAMS = 8
LONG = SamplingParams(max_tokens=390, return_log_probs=True)


def seconds_of_streams(client: EngineClient) -> float:
    """How long 8 streams take, from their common begin to their ends."""
    began = time.monotonic()
    for answer in [Answer(client, [number], max_tokens=100) for number in range(NUM_STREAMS)]:
        answer.wait()
    return time.monotonic() - began


def submit_long(channel: Channel, count: int) -> None:
    for number in range(count):
        channel.send(Submit(Request(f"r{number}", (1,), LONG), number))


def test_a_client_that_reads_nothing_is_cut_off_and_the_others_keep_their_pace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(channel_module, "MAX_UNSENT_BYTES", 64 << 10)
    with counting_engine(tmp_path, pool_tokens=40_000) as (engine, client):
        reading = EngineClient(str(tmp_path / "engine"))
        reading.wait_ready(10)
        company = [Answer(reading, [1], **vars(LONG)) for _ in range(60)]
        usual = seconds_of_streams(client)
        for answer in company:
            answer.wait()
        reading.close()
        silent = Channel.connect(str(tmp_path / "engine"))
        submit_long(silent, 60)  # they make twice what its socket holds
        assert seconds_of_streams(client) < 2 * usual + 5
        assert poll(lambda: "bytes are unread; at most 65536 may be" in caplog.text)
        assert poll(lambda: not engine.router.has_work)
        assert engine.router.ended_requests["cancelled"] > 0
        assert (engine.router.stats().kv_tokens_used, engine.server._handles) == (0, {})
        assert len(engine.server._clients) == 1
        assert seconds_of_streams(client) < 2 * usual + 5
        silent.close()


def test_a_client_with_requests_that_stands_still_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server_module, "MAX_UNREAD_SECONDS", 0.2)
    with counting_engine(tmp_path, running_max_req_size=4, max_queue_size=1000) as (engine, client):
        silent = Channel.connect(str(tmp_path / "engine"))
        submit_long(silent, 500)
        assert poll(lambda: "a client is cut off: it has read nothing for 0 s" in caplog.text)
        assert poll(lambda: not engine.router.has_work)
        assert Answer(client, [1], max_tokens=2).wait().tokens == [2, 3]
        silent.close()


WATCHER = """
import sys, time
from lightllm_backend.generation.engine_client import EngineClient
client = EngineClient(sys.argv[1])
client.wait_ready(10)
print("up", flush=True)
sys.stdin.read()
print(client.up, flush=True)
"""


@contextlib.contextmanager
def stopped_watcher(address: str) -> Iterator[subprocess.Popen[str]]:
    """A process that has a client of the engine, as the launch command has, and is stopped as by Ctrl-Z."""
    command = [sys.executable, "-c", WATCHER, address]
    with subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as watcher:
        try:
            assert watcher.stdout
            assert watcher.stdout.readline() == "up\n"
            watcher.send_signal(signal.SIGSTOP)
            assert poll(lambda: psutil.Process(watcher.pid).status() == psutil.STATUS_STOPPED)
            yield watcher
        finally:
            watcher.send_signal(signal.SIGCONT)
            watcher.kill()


def test_a_stopped_client_without_requests_stops_nobody_and_stays_connected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launch command is one: it gets statistics only, and those fill its socket."""
    monkeypatch.setattr(server_module, "STATS_SECONDS", 0.0)
    with (
        counting_engine(tmp_path) as (engine, client),
        stopped_watcher(str(tmp_path / "engine")) as watcher,
    ):
        _, idle = engine.server._clients
        for _ in range(30):
            if idle.num_unsent:
                break
            Answer(client, [1], max_tokens=300).wait()
        assert 0 < idle.num_unsent < 1000, "one message of statistics, since the others are left out"
        # As if time had passed: a shorter limit would hold for the other client too, whom a busy machine may hold up.
        idle._read_at -= 2 * server_module.MAX_UNREAD_SECONDS
        for _ in range(3):
            assert Answer(client, [7], max_tokens=20).wait().tokens == list(range(8, 28))
        assert idle.unread_seconds > server_module.MAX_UNREAD_SECONDS
        watcher.send_signal(signal.SIGCONT)
        assert watcher.communicate("", timeout=60)[0] == "True\n"


def test_who_reads_again_gets_the_latest_statistics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "STATS_SECONDS", 0.0)
    with counting_engine(tmp_path) as (engine, client):
        late = Channel.connect(str(tmp_path / "engine"))
        assert poll(lambda: len(engine.server._clients) == 2)
        _, other_end = engine.server._clients
        for _ in range(30):
            if other_end.num_unsent:
                break
            Answer(client, [1], max_tokens=300).wait()
        assert other_end.num_unsent
        Answer(client, [1], max_tokens=7).wait()
        assert poll(lambda: not engine.router.has_work)
        received: list[Message] = []

        def is_up_to_date() -> bool:
            received.extend(late.receive_available())
            return received[-1] == Stats(engine.router.stats())

        assert poll(is_up_to_date)
        late.close()


def test_a_client_that_is_stopped_in_the_middle_of_a_message_holds_nobody_up(tmp_path: Path) -> None:
    with counting_engine(tmp_path) as (engine, client):
        half = Channel.connect(str(tmp_path / "engine"))
        assert half.receive() == Ready(INFO)
        frame = frame_of(Submit(Request("half", (1, 2, 3), SamplingParams(max_tokens=2)), 5))
        half._socket.send(len(frame).to_bytes(4, "big") + frame[:20])
        assert poll(lambda: any(channel._received for channel in engine.server._clients))
        assert Answer(client, [1], max_tokens=2).wait().tokens == [2, 3]
        half._socket.send(frame[20:])
        assert poll(lambda: engine.router.ended_requests["length"] == 2)
        half.close()


def test_a_message_that_makes_no_sense_ends_its_client_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with counting_engine(tmp_path) as (engine, client):
        odd = Channel.connect(str(tmp_path / "engine"))
        odd.send(Submit(Request("a", (1,), SamplingParams(max_tokens=300)), 1))
        odd.send_frame(b"\x07")
        assert poll(lambda: "a client is cut off: its message makes no sense" in caplog.text)
        assert Answer(client, [1], max_tokens=2).wait().tokens == [2, 3]
        assert poll(lambda: not engine.router.has_work)
        odd.close()


def test_a_worker_that_does_not_read_holds_no_caller_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_client_module, "MAX_UNREAD_BYTES", 100_000)
    listener = listen(str(tmp_path / "engine"))
    client = EngineClient(str(tmp_path / "engine"))
    stopped = Channel.accept(listener)
    stopped.send(Ready(INFO))
    client.wait_ready(10)
    taken, began = [], time.monotonic()
    with pytest.raises(RequestError, match="UNAVAILABLE: the engine takes no requests at present; try again"):
        taken.extend(Answer(client, [number % 100] * 40, max_tokens=2) for number in range(100_000))
    assert time.monotonic() - began < 30
    for answer in taken:
        client.cancel(answer.uid)  # never refused
    assert time.monotonic() - began < 60
    assert len(client._outstanding) == len(taken), "the refused one is forgotten"
    received = [stopped.receive() for _ in range(2 * len(taken))]
    assert [message.request.uid for message in received[: len(taken)]] == [answer.uid for answer in taken]
    assert received[len(taken) :] == [Cancel(answer.uid) for answer in taken]
    assert Answer(client, [1], max_tokens=2), "it takes requests again"
    stopped.close()
    assert taken[0].wait().last.finish_reason is FinishReason.FAILED
    listener.close()
    client.close()


def test_a_lack_of_file_descriptors_keeps_out_new_clients_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    attempts: list[OSError] = []

    def accept(listener: socket.socket) -> Channel:
        attempts.append(OSError(errno.EMFILE, os.strerror(errno.EMFILE)))
        raise attempts[-1]

    with counting_engine(tmp_path) as (_, client):
        with monkeypatch.context() as lacking:
            lacking.setattr(Channel, "accept", accept)
            lacking.setattr(server_module, "ACCEPT_PAUSE_SECONDS", 0.02)
            waiting = EngineClient(str(tmp_path / "engine"))
            assert poll(lambda: len(attempts) >= 3)
            assert Answer(client, [1], max_tokens=5).wait().last.finish_reason is FinishReason.LENGTH
            assert not waiting.up
        waiting.wait_ready(10)
        waiting.close()
    assert caplog.text.count("a client cannot be accepted: [Errno 24] Too many open files") == 1
