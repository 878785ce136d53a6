# SPDX-License-Identifier: Apache-2.0
"""Disconnects HTTP clients that read nothing of their answers, which Triton server keeps for them without a limit.

Triton server has no option for that (for gRPC it has one: --grpc-keepalive-timeout, 20 s by default). Linux ends a
connection whose other end has taken nothing for TCP_USER_TIMEOUT, and a connection inherits that option from the socket
that listened for it. So we set it there, on a duplicate of the server's descriptor.
"""

from __future__ import annotations

import ctypes
import os
import socket

import psutil

_PIDFD_GETFD = 438  # the system call's number, on all architectures
_libc = ctypes.CDLL(None, use_errno=True)


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
    process = os.pidfd_open(pid)
    try:
        for descriptor in listeners:
            with socket.socket(fileno=_duplicate(process, descriptor)) as listener:
                listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(1e3 * seconds))
    finally:
        os.close(process)


def _duplicate(process: int, descriptor: int) -> int:
    """A duplicate of another process's descriptor; both are of the same file."""
    duplicate: int = _libc.syscall(_PIDFD_GETFD, process, descriptor, 0)
    if duplicate < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{os.strerror(number)} (pidfd_getfd)")
    return duplicate
