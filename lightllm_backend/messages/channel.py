# SPDX-License-Identifier: Apache-2.0
"""Framed messages between processes of one machine: Unix sockets, msgpack, plain data only. No torch.

Stubs and workers may run on different interpreters and numpy versions, so nothing is pickled. Each message is a list
whose first item names its kind:

    down, to the worker:  [SUBMIT, request, number] · [CANCEL, uid] · [STOP, uid] · [CLOSE, reason]
    up, from the worker:  [READY, info] · [TOKENS, numbers, tokens, [[number, chunk], …]] · [STATS, stats]
    return channel:       [DELIVERED, uid, state] · [GONE, uid] · [FAILED, uid, message]

A client numbers its requests, so that the tokens of a step travel as two packed arrays, int64 numbers and int32 tokens:
one more token for each of these requests. Only where there is more to say of a request it gets a chunk of its own.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import tempfile
import threading
from dataclasses import asdict, dataclass
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

import msgpack
import psutil

from lightllm_backend.lengths import LengthLimits
from lightllm_backend.request import FinishReason, Request, RequestError, SamplingParams, TokenChunk

SUBMIT, CANCEL, STOP, CLOSE, READY, TOKENS, STATS, DELIVERED, GONE, FAILED = range(10)


@dataclass(frozen=True)
class EngineInfo:
    """What a worker has found out at start and everybody else needs."""

    model: str
    dtype: str
    device: str
    vocab_size: int
    eos_ids: tuple[int, ...]
    lengths: LengthLimits
    pool_tokens: int
    memory: dict[str, int]  # bytes on each rank's device, by part

    @classmethod
    def unpack(cls, fields: dict[str, Any]) -> EngineInfo:
        """From the plain data of a message."""
        plain = {"eos_ids": tuple(fields["eos_ids"]), "lengths": LengthLimits(**fields["lengths"])}
        return cls(**{**fields, **plain})


@dataclass(frozen=True)
class EngineStats:
    """The Router's counters at one moment; totals count from the worker's start."""

    queued_requests: int = 0
    running_requests: int = 0
    kv_tokens_used: int = 0
    kv_tokens_cached: int = 0
    kv_tokens_total: int = 0
    prompt_tokens_total: int = 0
    generated_tokens_total: int = 0
    preemptions_total: int = 0
    device_seconds_total: float = 0.0


class ChannelClosed(ConnectionError):
    """The other end is gone."""


class Channel:
    """One end of a connection. Many threads may send; one receives."""

    def __init__(self, connection: Connection[bytes, bytes]) -> None:
        self._connection = connection
        # Held by who sends, by who receives, and by who closes; the last takes the others before the socket is gone.
        self._send_lock, self._receive_lock, self._close_lock = (threading.Lock() for _ in range(3))

    @classmethod
    def connect(cls, address: str) -> Channel:
        """Raises ChannelClosed if nobody listens at `address`."""
        try:
            return cls(Client(address, family="AF_UNIX"))
        except OSError as error:
            raise ChannelClosed(f"nobody listens at {address}: {error}") from None

    @classmethod
    def accept(cls, listener: socket.socket) -> Channel:
        """The next one who connects to `listener`; blocks. OSError once the listener is closed."""
        connected, _ = listener.accept()
        return cls(Connection(connected.detach()))

    def send(self, *message: Any) -> None:
        frame = msgpack.packb(message)
        with self._send_lock:
            try:
                self._connection.send_bytes(frame)
            except OSError as error:
                raise ChannelClosed(str(error)) from None

    def receive(self) -> list[Any]:
        """The next message; blocks. Raises ChannelClosed at the end."""
        with self._receive_lock:
            try:
                frame = self._connection.recv_bytes()
            except (EOFError, OSError) as error:
                raise ChannelClosed(str(error)) from None
        message: list[Any] = msgpack.unpackb(frame)
        return message

    def has_message(self) -> bool:
        """Whether receive() would find something at once: a message, or the end."""
        try:
            return self._connection.poll(0)
        except OSError:
            return True

    def fileno(self) -> int:
        return self._connection.fileno()

    def close(self) -> None:
        """Ends both directions; threads that are blocked in send() or receive() get ChannelClosed.

        They have left when the socket is closed: its number may be another file's at once.
        """
        with self._close_lock:
            if self._connection.closed:
                return
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self._connection.fileno())) as duplicate:
                duplicate.shutdown(socket.SHUT_RDWR)
            with self._send_lock, self._receive_lock:
                self._connection.close()


def listen(address: str) -> socket.socket:
    """A listener at a path in a private directory. What a dead process left behind there is replaced."""
    Path(address).unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    return listener


def run_directory() -> Path:
    """The private directory in which the models of one Triton server find each other, made if it is missing.

    Derived from the server that the calling stub belongs to (its parent process), so two servers on one machine do not
    meet.
    """
    return run_directory_of(os.getppid())


def run_directory_of(server_pid: int) -> Path:
    """The run directory of the Triton server with this pid. `LIGHTLLM_RUN_DIR` overrides it."""
    if override := os.environ.get("LIGHTLLM_RUN_DIR"):
        directory = Path(override)
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        return directory
    server = psutil.Process(server_pid)
    base = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()) / f"lightllm-{os.getuid()}"
    base.mkdir(exist_ok=True, mode=0o700)
    status = base.lstat()
    if status.st_uid != os.getuid() or not stat.S_ISDIR(status.st_mode) or status.st_mode & 0o077:
        raise PermissionError(f"{base} is not a directory that only this user may use")
    directory = base / f"{server.pid}-{int(server.create_time())}"
    directory.mkdir(exist_ok=True, mode=0o700)
    return directory


def leave_run_directory() -> None:
    """Remove this server's run directory if nothing is left in it: the last of the models to go does."""
    if os.environ.get("LIGHTLLM_RUN_DIR"):
        return
    with contextlib.suppress(OSError):
        run_directory().rmdir()


def remove_stale_run_directories() -> None:
    """Remove what servers that are no more have left beside this one's run directory."""
    if os.environ.get("LIGHTLLM_RUN_DIR"):
        return
    for directory in run_directory().parent.iterdir():
        pid, _, created = directory.name.partition("-")
        with contextlib.suppress(OSError, ValueError, psutil.AccessDenied):
            try:
                alive = int(psutil.Process(int(pid)).create_time()) == int(created)
            except psutil.NoSuchProcess:
                alive = False
            if not alive:
                _remove(directory)


def _remove(directory: Path) -> None:
    for file in directory.iterdir():
        file.unlink()
    directory.rmdir()


def pack_request(request: Request) -> list[Any]:
    return [request.uid, request.prompt_ids, asdict(request.sampling), request.deadline, request.urgent]


def unpack_request(packed: list[Any]) -> Request:
    uid, prompt_ids, sampling, deadline, urgent = packed
    return Request(uid, tuple(prompt_ids), SamplingParams.from_plain(sampling), deadline, urgent)


def pack_chunk(chunk: TokenChunk) -> list[Any]:
    reason = chunk.finish_reason.value if chunk.finish_reason else None
    error = str(chunk.error) if chunk.error else None
    return [chunk.uid, chunk.token_ids, chunk.log_probs, reason, chunk.num_prompt_tokens, chunk.queue_seconds, error]


def unpack_chunk(packed: list[Any]) -> TokenChunk:
    uid, token_ids, log_probs, reason, num_prompt_tokens, queue_seconds, error = packed
    return TokenChunk(
        uid, token_ids, log_probs, FinishReason(reason) if reason else None, num_prompt_tokens, queue_seconds,
        RequestError.parse(error) if error else None,
    )  # fmt: skip
