# SPDX-License-Identifier: Apache-2.0
"""The guard: one small process for each Triton server, which lets none of its processes outlive it. No torch.

It ends a server that cannot work any more: a dead step has no supervisor, and Triton server itself neither notices it
nor obeys SIGTERM then. It kills workers that stand still, which the supervisor replaces. Once the server is dead, for
whatever reason, it kills what the server has left, some of which would wait for ever, and removes their files.

The launch command starts the guard, else the first model that loads: whoever gets the lock in the run directory passes
it on to a new guard. All of them keep looking, so a guard that was killed is replaced within a second, and one that
stays stopped by a signal after STOPPED_SECONDS.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import psutil

from lightllm_backend import logs
from lightllm_backend.environment import STUB, package_environment
from lightllm_backend.file_limit import raise_file_limit
from lightllm_backend.launch.closing import EngineCloser, wait_delivered
from lightllm_backend.messages.run_directory import engine_address, guard_lock, remove_run_directory
from lightllm_backend.messages.vitals import ENGINE, STEPS, Reading, process_status, read_vitals, standstills

LAUNCHER_VARIABLE = "LIGHTLLM_LAUNCHER"  # the launch command, as `identity` spells it
WORKER = "lightllm_backend.worker.main"
MODELS = (*STEPS, "health")

CHECK_SECONDS = 1.0  # the death of a step, of the server or of the launch command wakes the guard at once
# How long a process must be seen to stand still before it is ended: stopped by a signal; or late or stuck, which a
# busy machine alone may cause for some seconds.
STOPPED_SECONDS, LATE_SECONDS = 5.0, 10.0
SCAN_SECONDS = 2.0  # from one search for processes without vitals, which load, to the next
TELL_SECONDS = 2.0  # for the clients of a server that is ended to hear it
TERM_SECONDS = 1.0  # for the server to end in order
KILL_SECONDS = 5.0  # for killed processes to be gone; the kernel may have to free a GPU first


class Guard:
    """Watches a server until it is dead, then removes what it has left.

    server, launcher: the server and the launch command as `identity` spells them; no launcher: empty.
    """

    def __init__(self, server: str, directory: Path, launcher: str) -> None:
        self._server = server
        self._directory = directory
        self._launcher = launcher
        self._known: dict[int, str] = {}  # the identities of stubs and workers, by pid
        self._regions: set[str] = set()  # of shared memory
        self._faults: dict[int, float] = {}  # by pid, when a process was first seen to stand still
        self._doomed: set[int] = set()  # the pids because of which the server is ended
        self._checked_at = self._scanned_at = 0.0

    def run(self) -> None:
        """Watch, end and clean up."""
        while is_alive(self._server):
            readings = read_vitals(self._directory)
            reason = self.check(readings)
            # Whoever stops a server may kill all of its processes at once, of which it is the largest and dies last.
            if reason and not is_killed(self._server):
                self._end_server(reason)
            else:
                self._wait([reading.pid for reading in readings if reading.alive])
        self._clean_up()

    def check(self, readings: Sequence[Reading]) -> str | None:
        """Kill workers that stand still; return why the server must be ended, or None."""
        now = time.monotonic()
        if now - self._checked_at > LATE_SECONDS / 2:
            self._faults.clear()  # the guard itself was held up, and so perhaps the whole machine
        self._checked_at = now
        self._find_processes(readings, now)
        if self._launcher and not is_alive(self._launcher):
            return "the launch command is dead"
        lasting = self._lasting_faults(readings, now)
        workers = {reading.pid for reading in readings if reading.is_worker}
        workers |= {pid for pid in lasting.keys() & self._known.keys() if WORKER in _arguments(pid)}
        for pid in workers & lasting.keys() & self._known.keys():
            say(f"the engine is replaced: {lasting[pid]}")
            self._kill([pid])
        self._doomed = lasting.keys() - workers
        return "; ".join(lasting[pid] for pid in self._doomed) or None

    def _lasting_faults(self, readings: Sequence[Reading], now: float) -> dict[int, str]:
        """Find what is dead, or has stood still for long enough: pid to reason. The supervisor sees to dead workers."""
        faults = standstills(readings, now)
        stopped = {reading.pid for reading in readings if reading.stopped}
        named = {reading.pid: reading for reading in readings}
        others = {pid: _name(pid) for pid in self._known.keys() - named.keys()} | {pid_of(self._server): "tritonserver"}
        for pid, name in others.items():
            if process_status(pid) == psutil.STATUS_STOPPED:
                faults[pid] = f"{name} (process {pid}) is stopped"
                stopped.add(pid)
        self._faults = {pid: self._faults.get(pid, now) for pid in faults}
        lasting = {}
        for pid, reason in faults.items():
            reading = named.get(pid)
            if reading and not reading.alive:
                if not reading.is_worker:
                    lasting[pid] = reason
            elif now - self._faults[pid] >= (STOPPED_SECONDS if pid in stopped else LATE_SECONDS):
                lasting[pid] = reason
        return lasting

    def _find_processes(self, readings: Sequence[Reading], now: float) -> None:
        """Note the server's stubs and workers: those with vitals, and while some load, the others too."""
        roles = {reading.role for reading in readings if reading.alive}
        is_complete = roles >= {*MODELS, ENGINE}
        pids = [reading.pid for reading in readings if reading.alive]
        if not is_complete and now - self._scanned_at >= SCAN_SECONDS:
            self._scanned_at = now
            pids += self._scan()
        for pid in pids:
            if pid not in self._known:
                self._known[pid] = identity(pid)
                self._regions.update(_regions(pid))
        self._known = {pid: process for pid, process in self._known.items() if is_alive(process)}

    def _scan(self) -> Iterator[int]:
        """The pids of our stubs and workers, orphaned or not, by their arguments."""
        for pid in psutil.pids():
            arguments = _arguments(pid)
            is_worker = WORKER in arguments and engine_address(self._directory) in arguments
            is_stub = arguments[0].endswith(STUB) and str(pid_of(self._server)) in arguments and _name(pid) in MODELS
            if is_worker or is_stub:
                yield pid

    def _session(self) -> Iterator[int]:
        """The pids of all processes in the server's session, which a launch command gives it."""
        for pid in psutil.pids():
            with contextlib.suppress(ProcessLookupError):
                if os.getsid(pid) == pid_of(self._server):
                    yield pid

    def _wait(self, pids: Sequence[int]) -> None:
        """Wait for CHECK_SECONDS, or until one of these processes, the server or the launch command has died."""
        if self._launcher:
            pids = [*pids, pid_of(self._launcher)]
        with contextlib.ExitStack() as stack:
            descriptors = []
            for pid in (pid_of(self._server), *pids):
                with contextlib.suppress(OSError):  # it has just died, or the kernel is older than Linux 5.3
                    descriptors.append(os.pidfd_open(pid))
                    stack.callback(os.close, descriptors[-1])
            select.select(descriptors, [], [], CHECK_SECONDS)

    def _end_server(self, reason: str) -> None:
        """Tell the clients, as far as the steps still can, and end the server."""
        say(f"the server is ended: {reason}")
        # Triton server aborts if a step goes on after it has stood still.
        self._kill(self._doomed & self._known.keys())
        closer = EngineCloser(self._directory)
        closer.close_engine(f"the server is stopped: {reason}")
        wait_delivered(self._directory, TELL_SECONDS)
        closer.disconnect()
        for number, seconds in ((signal.SIGTERM, TERM_SECONDS), (signal.SIGKILL, KILL_SECONDS)):
            if is_alive(self._server):
                os.kill(pid_of(self._server), number)
                wait_dead([self._server], seconds)

    def _clean_up(self) -> None:
        """Kill what is left of the dead server, and remove shared memory, sockets and files."""
        for pid in {*self._scan(), *(self._session() if self._launcher else ())}:
            self._regions.update(_regions(pid))
            self._known[pid] = identity(pid)
        self._kill(self._known)
        for region in self._regions:
            Path("/dev/shm", region).unlink(missing_ok=True)
        remove_run_directory(self._directory)

    def _kill(self, pids: Iterable[int]) -> None:
        """Kill known processes and their children, and wait until they are gone."""
        doomed = [self._known[pid] for pid in pids]
        for process in filter(is_alive, list(doomed)):
            with contextlib.suppress(psutil.NoSuchProcess):
                doomed += [identity(child.pid) for child in psutil.Process(pid_of(process)).children(recursive=True)]
        doomed = [process for process in doomed if is_alive(process) and pid_of(process) != os.getpid()]
        for process in doomed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid_of(process), signal.SIGKILL)
        wait_dead(doomed, KILL_SECONDS)


def identity(pid: int, is_child: bool = False) -> str:
    """The process's pid and start time in the kernel's ticks, which no other process shares; empty if it is dead.

    is_child: the caller's, which it has not waited for; so there is an identity even if it is dead.
    """
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    state, started = after_name[0], after_name[19]  # fields 3 and 22 of proc(5)
    return "" if state in "ZX" and not is_child else f"{pid}:{started}"


def pid_of(process: str) -> int:
    """The pid in an identity."""
    return int(process.partition(":")[0])


def is_alive(process: str) -> bool:
    """Whether the process with this identity is neither dead nor a zombie."""
    return process != "" and identity(pid_of(process)) == process


def is_killed(process: str) -> bool:
    """Whether the process with this identity is dead, or will be once the system has freed what it holds."""
    try:
        status = Path(f"/proc/{pid_of(process)}/status").read_text(errors="replace")
    except OSError:
        return True
    pending = re.search(r"^ShdPnd:\s*([0-9a-f]+)$", status, re.MULTILINE)  # a mask of signals; see proc(5)
    is_pending = pending is not None and int(pending[1], 16) >> (signal.SIGKILL - 1) & 1 == 1
    return is_pending or not is_alive(process)


def wait_dead(processes: Sequence[str], seconds: float) -> bool:
    """Wait until all are dead, for `seconds` at most; return whether they are."""
    end = time.monotonic() + seconds
    while any(map(is_alive, processes)):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def say(line: str) -> None:
    """Print an error among the lines of the launch command, or of the server."""
    logs.say("guard", "error", line)


def _arguments(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return [""]


def _name(pid: int) -> str:
    """The model of a stub, from its second argument …/MODEL/VERSION/model.py; a worker's name."""
    arguments = _arguments(pid)
    if WORKER in arguments:
        return "worker"
    return Path(arguments[1]).parent.parent.name if len(arguments) > 1 else ""


def _regions(pid: int) -> list[str]:
    """The shared memory of a stub: the one of its arguments that is a file there."""
    arguments = _arguments(pid)
    if not arguments[0].endswith(STUB):
        return []
    return [name for name in arguments[1:] if name and "/" not in name and Path("/dev/shm", name).exists()]


# How a guard is started


def start_guard(server: str, directory: Path, python: str, launcher: str = "") -> subprocess.Popen[bytes] | None:
    """Start the guard of a server, and of its launch command if there is one; return None if it has or needs none.

    Its lock is there before the first guard is. The guard that has cleaned up removes it, and holds it to its own end.
    """
    try:
        lock = os.open(guard_lock(directory), os.O_RDWR)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(lock).st_nlink == 0:  # removed since it was opened
            return None
        guard = subprocess.Popen(
            [python, "-m", "lightllm_backend.launch.guard", server, str(directory), launcher],
            env=package_environment(os.environ),
            stdin=subprocess.DEVNULL,
            pass_fds=[lock],  # the lock is the open file's, and held until the guard ends
            start_new_session=True,  # no signal to the server's group reaches it
        )
        os.ftruncate(lock, 0)
        os.pwrite(lock, identity(guard.pid).encode(), 0)  # for GuardKeeper
        return guard
    except BlockingIOError:
        return None
    finally:
        os.close(lock)


class GuardKeeper:
    """Starts the guard of a server where there is none, and kills one that stays stopped by a signal."""

    def __init__(self, server: str, directory: Path, python: str, launcher: str = "") -> None:
        self._start = partial(start_guard, server, directory, python, launcher)
        self._lock_file = guard_lock(directory)
        self._has_begun = False
        self._guard: subprocess.Popen[bytes] | None = None
        self._stopped_since: float | None = None

    def keep(self) -> None:
        """Look once; to be called every second or so."""
        if self._guard:
            self._guard.poll()  # or it would be a zombie once it is dead
        with contextlib.suppress(OSError):  # for want of a file descriptor, or of memory: the next call tries again
            if not self._has_begun:
                self._lock_file.touch(mode=0o600)
                self._has_begun = True
            if started := self._start():
                self._guard = started
            else:
                self._end_stopped(self._lock_file.read_text())

    def _end_stopped(self, guard: str) -> None:
        if not is_alive(guard) or process_status(pid_of(guard)) != psutil.STATUS_STOPPED:
            self._stopped_since = None
            return
        now = time.monotonic()
        if self._stopped_since is None:
            self._stopped_since = now
        elif now - self._stopped_since >= STOPPED_SECONDS:
            say(f"the guard (process {pid_of(guard)}) is stopped and replaced")
            os.kill(pid_of(guard), signal.SIGKILL)


def keep_guard(server_pid: int, directory: Path, python: str) -> None:
    """Keep a guard for this process's parent."""
    keeper = GuardKeeper(identity(server_pid), directory, python, os.environ.get(LAUNCHER_VARIABLE, ""))

    def keep() -> None:
        while os.getppid() == server_pid:
            time.sleep(CHECK_SECONDS)
            keeper.keep()

    keeper.keep()
    threading.Thread(target=keep, name="guard", daemon=True).start()


def main() -> None:
    """Guard a server; the arguments are its identity, its run directory, and its launch command's identity."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it ends after the server
    raise_file_limit()
    server, directory, launcher = sys.argv[1:]
    Guard(server, Path(directory), launcher).run()


if __name__ == "__main__":
    main()
