# SPDX-License-Identifier: Apache-2.0
"""Stops single threads of a server for a while, as a busy machine may do."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import psutil

from tests.polling import poll

SEIZE, INTERRUPT, DETACH = 0x4206, 0x4207, 17  # ptrace's requests
ALL_THREADS = 0x40000000  # __WALL
_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


@contextmanager
def frozen(server: psutil.Process, threads: list[int]) -> Iterator[None]:
    """These threads do nothing inside. Each is stopped where it waits, so that it holds no lock of others."""
    with ExitStack() as stack:
        for thread in threads:
            assert poll(partial(_stop, server.pid, thread)), f"thread {thread} never waits"
            stack.callback(_ptrace, DETACH, thread)
        yield


def connection_threads(server: psutil.Process, port: int) -> list[int]:
    """The threads of an idle server that wait for what clients send to this port."""
    connections = {
        connection.fd
        for connection in server.net_connections("tcp")
        if connection.status == psutil.CONN_ESTABLISHED and connection.laddr.port == port
    }
    return [thread.id for thread in server.threads() if connections & _watched(server.pid, thread.id)]


def _stop(pid: int, thread: int) -> bool:
    """Stop a thread if it waits."""
    _ptrace(SEIZE, thread)
    _ptrace(INTERRUPT, thread)
    os.waitpid(thread, ALL_THREADS)
    if _watched(pid, thread):
        return True
    _ptrace(DETACH, thread)
    return False


def _watched(pid: int, thread: int) -> set[int]:
    """The descriptors for which a thread waits; none if it does something else."""
    process = Path(f"/proc/{pid}")
    call = (process / "task" / str(thread) / "syscall").read_text(encoding="ascii").split()
    if len(call) < 2 or not call[1].startswith("0x"):
        return set()
    epoll = process / "fdinfo" / str(int(call[1], 16))
    try:
        return {int(descriptor) for descriptor in re.findall(r"tfd: +(\d+)", epoll.read_text(encoding="ascii"))}
    except FileNotFoundError:  # the call's first argument is something else
        return set()


def _ptrace(request: int, thread: int) -> None:
    if _libc.ptrace(request, thread, None, None) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
