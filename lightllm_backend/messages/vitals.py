# SPDX-License-Identifier: Apache-2.0
"""Vitals: each process of a server publishes that it lives and works, for the health checks. No torch.

Each process owns one small file in the server's run directory and maps it into memory: the time of its last beat, how
many pieces of work it has taken, when it began with the current one, how many requests it has open, and whether it
takes no more. Writing never blocks and needs no disk space. Reading never waits for the process, so a stopped process
is noticed as well as a dead one.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

# Whoever drains a server waits for a beat that says that nothing is open.
BEAT_SECONDS = 0.25
# A live process beats many times a second; waiting for a core or for the GIL can delay a beat by several seconds.
LATE_BEAT_SECONDS = 10.0
# One piece of work of a stub takes milliseconds. A process that is stuck is found after this time and the guard's 10 s.
PATIENCE_SECONDS = 20.0
SUFFIX = ".vitals"
# The roles of the processes on a request's way; several processes may share a role.
STEPS = ("tokenizer", "generation", "detokenizer", "lightllm_unary")
ENGINE = "worker-0"  # the rank that runs the Router; further ranks compute with it
# The fields of a file: double beat, int64 taken, double busy_since, double patience, int64 open, int64 closing.
_FIELDS = "dqddqq"
_BEAT, _TAKEN, _BUSY_SINCE, _, _OPEN, _CLOSING = range(0, 48, 8)
_FILE_SIZE = 48


class Vitals:
    """This process's own file, from construction to `close`. Only one thread may call `turn` and `working`.

    role: what the process is, for example "tokenizer". patience: how many seconds one piece of work may take.
    count_open: counts the requests that the process has yet to answer.
    """

    def __init__(
        self, directory: Path, role: str, patience: float = PATIENCE_SECONDS, count_open: Callable[[], int] = lambda: 0
    ) -> None:
        forget_dead(directory, role)
        self._path = directory / f"{role}-{os.getpid()}{SUFFIX}"
        with self._path.open("w+b") as file:
            file.write(struct.pack(_FIELDS, time.monotonic(), 0, 0.0, patience, 0, 0))
            file.flush()
            self._fields = mmap.mmap(file.fileno(), _FILE_SIZE)
        self._taken = 0
        self._count_open = count_open
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

    def refuse_requests(self) -> None:
        """Publish that this process takes no more requests, since the server is being stopped."""
        struct.pack_into("q", self._fields, _CLOSING, 1)

    def close(self) -> None:
        """Remove the file: the process leaves the server in order."""
        self._closing.set()
        self._beater.join()
        self._path.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._closing.wait(BEAT_SECONDS):
            struct.pack_into("q", self._fields, _OPEN, self._count_open())
            struct.pack_into("d", self._fields, _BEAT, time.monotonic())


@dataclass(frozen=True)
class Reading:
    """The vitals of one process at one moment. Times are time.monotonic() seconds, which all processes share."""

    role: str
    pid: int
    alive: bool
    stopped: bool  # by a signal
    beat: float
    taken: int
    busy_since: float  # 0: not busy
    patience: float
    open: int  # requests
    closing: int  # 1: it takes no more requests

    @property
    def is_worker(self) -> bool:
        return self.role.startswith("worker-")

    @property
    def name(self) -> str:
        return f"{self.role} (process {self.pid})"


def read_vitals(directory: Path) -> list[Reading]:
    """The vitals of all processes that have not left the server at `directory` in order; none once it is removed."""
    paths: list[Path] = []
    with contextlib.suppress(FileNotFoundError):  # glob would raise it too, if the directory is removed meanwhile
        paths = sorted(path for path in directory.iterdir() if path.suffix == SUFFIX)
    readings = []
    for path in paths:
        role, _, pid = path.name.removesuffix(SUFFIX).rpartition("-")
        with contextlib.suppress(FileNotFoundError, ValueError, struct.error):  # it leaves, or is just being made
            # In this order: a process that leaves removes its file before it ends, so it is never found dead.
            status = process_status(int(pid))
            fields = struct.unpack(_FIELDS, path.read_bytes())
            readings.append(Reading(role, int(pid), status is not None, status == psutil.STATUS_STOPPED, *fields))
    return readings


def standstills(readings: Sequence[Reading], now: float) -> dict[int, str]:
    """Find the dead, stopped and stuck processes: pid to reason in words."""
    reasons = {}
    for reading in readings:
        silent = now - reading.beat
        busy = now - reading.busy_since if reading.busy_since else 0.0
        if not reading.alive:
            reasons[reading.pid] = f"{reading.name} is dead"
        elif reading.stopped:
            reasons[reading.pid] = f"{reading.name} is stopped"
        elif silent > LATE_BEAT_SECONDS:
            reasons[reading.pid] = f"{reading.name} has stood still for {silent:.0f} s"
        elif busy > reading.patience:
            reasons[reading.pid] = f"{reading.name} has been stuck for {busy:.0f} s"
    return reasons


def forget_dead(directory: Path, role: str | None = None) -> None:
    """Remove the files that dead processes of this role have left; None: of all roles."""
    for reading in read_vitals(directory):
        if role in (None, reading.role) and not reading.alive:
            (directory / f"{reading.role}-{reading.pid}{SUFFIX}").unlink(missing_ok=True)


def process_status(pid: int) -> str | None:
    """The process's state, as psutil names it; None: it is dead."""
    try:
        status: str = psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return None
    return None if status in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD) else status
