# SPDX-License-Identifier: Apache-2.0
"""Vitals: each process of a server publishes that it lives and works, for the health checks. No torch.

Each process owns one small file in the server's run directory and maps it into memory: the time of its last beat, how
many pieces of work it has taken, and when it began with the current one. Writing never blocks and needs no disk space.
Reading never waits for the process, so a stopped process is noticed as well as a dead one.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

BEAT_SECONDS = 1.0  # a tenth of LATE_BEAT_SECONDS (launch/health.py)
SUFFIX = ".vitals"
# The fields of a file: double beat, int64 taken, double busy_since, double patience.
_BEAT, _TAKEN, _BUSY_SINCE, _PATIENCE = range(0, 32, 8)
_FILE_SIZE = 32


class Vitals:
    """This process's own file, from construction to `close`. Only one thread may call `turn` and `working`.

    role: what the process is, for example "tokenizer". patience: how many seconds one piece of work may take.
    """

    def __init__(self, directory: Path, role: str, patience: float = 30.0) -> None:
        _forget_dead(directory, role)
        self._path = directory / f"{role}-{os.getpid()}{SUFFIX}"
        with self._path.open("w+b") as file:
            file.write(struct.pack("dqdd", time.monotonic(), 0, 0.0, patience))
            file.flush()
            self._fields = mmap.mmap(file.fileno(), _FILE_SIZE)
        self._taken = 0
        self._closing = threading.Event()
        self._beater = threading.Thread(target=self._beat, name="vitals", daemon=True)
        self._beater.start()

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Surrounds one piece of work."""
        self.took()
        self.turn(busy=True)
        try:
            yield
        finally:
            self.turn(busy=False)

    def took(self) -> None:
        """Count one more piece of work."""
        self._taken += 1
        struct.pack_into("q", self._fields, _TAKEN, self._taken)

    def turn(self, busy: bool) -> None:
        """Begin a piece of work or, if not `busy`, begin to wait for one."""
        struct.pack_into("d", self._fields, _BUSY_SINCE, time.monotonic() if busy else 0.0)

    def close(self) -> None:
        """Remove the file: the process leaves the server in order."""
        self._closing.set()
        self._beater.join()
        self._path.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._closing.wait(BEAT_SECONDS):
            struct.pack_into("d", self._fields, _BEAT, time.monotonic())


@dataclass(frozen=True)
class Reading:
    """The vitals of one process at one moment. Times are time.monotonic() seconds, which all processes share."""

    role: str
    pid: int
    alive: bool
    beat: float
    taken: int
    busy_since: float  # 0: not busy
    patience: float

    @property
    def name(self) -> str:
        return f"{self.role} (process {self.pid})"


def read_vitals(directory: Path) -> list[Reading]:
    """The vitals of all processes that have not left the server at `directory` in order."""
    readings = []
    for path in sorted(directory.glob(f"*{SUFFIX}")):
        role, _, pid = path.name.removesuffix(SUFFIX).rpartition("-")
        with contextlib.suppress(FileNotFoundError, ValueError, struct.error):  # it leaves, or is just being made
            fields = struct.unpack("dqdd", path.read_bytes())
            readings.append(Reading(role, int(pid), _is_alive(int(pid)), *fields))
    return readings


def _forget_dead(directory: Path, role: str) -> None:
    """Remove the files that dead processes of this role have left."""
    for reading in read_vitals(directory):
        if reading.role == role and not reading.alive:
            (directory / f"{role}-{reading.pid}{SUFFIX}").unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False
