# SPDX-License-Identifier: Apache-2.0
"""Sets options on sockets of Triton server's HTTP frontend, on duplicates of the server's descriptors.

Triton server has no options of its own for either of these:

Clients that read nothing. Triton server keeps their answers without a limit. (For gRPC it has one:
--grpc-keepalive-timeout, 20 s by default.) Linux ends a connection whose other end has taken nothing for
TCP_USER_TIMEOUT, and a connection inherits that option from the socket that listened for it.

Many answers at once. A thread of the frontend is told of each part of an answer by a message through a pair of sockets,
whose buffer holds 278 messages by default. If the next one does not fit, Triton server drops it, and the client waits
for ever. A flood gets that far: one thread has most of the connections, and between two messages it serves all of them.
findings/http_answers_are_lost.sh shows it without our models.
"""

from __future__ import annotations

import ctypes
import os
import socket
from collections.abc import Iterable, Iterator

import psutil

_PIDFD_GETFD = 438  # the system call's number, on all architectures
_SO_SNDBUFFORCE = 32  # SO_SNDBUF beyond net.core.wmem_max, for who has CAP_NET_ADMIN
_libc = ctypes.CDLL(None, use_errno=True)

MESSAGE_BUFFER = 1 << 25  # bytes; the system doubles them. Messages take memory only while they wait.
MESSAGE_BYTES = 768  # what Linux counts for a message of 17 bytes, on 64-bit machines


def limit_unread_seconds(pid: int, port: int, seconds: float) -> None:
    """Let a child process's server at this port disconnect clients that have taken nothing of what is sent for so long.

    Connections that are open already stay as they are. Raises OSError if the system does not allow it.
    """
    listeners = [
        connection.fd
        for connection in psutil.Process(pid).net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
    ]
    if not listeners:
        raise OSError(f"process {pid} does not listen at port {port}")
    for listener in _duplicates(pid, listeners):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(1e3 * seconds))


def enlarge_message_buffers(pid: int) -> int | None:
    """Enlarge the buffers of a child process's pairs of sockets; return how many messages the smallest holds now.

    None: the process has no such pairs. Raises OSError if the system does not allow it.
    """
    pairs = [
        connection.fd
        for connection in psutil.Process(pid).net_connections("unix")
        if connection.type == socket.SOCK_STREAM and not connection.laddr
    ]
    sizes = [_enlarge(one) for one in _duplicates(pid, pairs)]
    return min(sizes) // MESSAGE_BYTES if sizes else None


def _enlarge(one: socket.socket) -> int:
    """Enlarge a socket's send buffer as far as the system allows; return its size in bytes."""
    with socket.socket(socket.AF_UNIX) as trial:  # net.core.wmem_max may allow less than the socket has
        _set_send_buffer(trial)
        if _send_buffer(trial) > _send_buffer(one):
            _set_send_buffer(one)
    return _send_buffer(one)


def _set_send_buffer(one: socket.socket) -> None:
    try:
        one.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, MESSAGE_BUFFER)
    except PermissionError:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MESSAGE_BUFFER)


def _send_buffer(one: socket.socket) -> int:
    return one.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)


def _duplicates(pid: int, descriptors: Iterable[int]) -> Iterator[socket.socket]:
    """Duplicates of another process's sockets, which are the same sockets; each is closed before the next."""
    process = os.pidfd_open(pid)
    try:
        for descriptor in descriptors:
            duplicate = _libc.syscall(_PIDFD_GETFD, process, descriptor, 0)
            if duplicate < 0:
                number = ctypes.get_errno()
                raise OSError(number, f"{os.strerror(number)} (pidfd_getfd)")
            with socket.socket(fileno=duplicate) as one:
                yield one
    finally:
        os.close(process)
