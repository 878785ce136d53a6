# SPDX-License-Identifier: Apache-2.0
"""The run directory: the private directory in which the processes of one server find each other. No torch."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import tempfile
import time
from pathlib import Path

import psutil

from lightllm_backend.environment import STUB
from lightllm_backend.messages.seal import KEY_FILE

MAX_SOCKET_PATH = 107  # bytes, without the final zero; see unix(7)
_OVERRIDE = "LIGHTLLM_RUN_DIR"
_ADVICE = "; set LIGHTLLM_RUN_DIR, XDG_RUNTIME_DIR or TMPDIR to a directory"


class RunDirectoryError(RuntimeError):
    """There can be no run directory; the message says what to set."""


def server_pid() -> int:
    """The pid of the server that this stub belongs to: its parent. Raises RunDirectoryError if the server is dead."""
    pid = os.getppid()
    # A stub's own arguments hold the server's pid. An orphan's parent is another process.
    arguments = Path("/proc/self/cmdline").read_text(errors="replace").split("\0")
    if arguments[0].endswith(STUB) and str(pid) not in arguments:
        raise RunDirectoryError("this model's server is dead")
    return pid


def run_directory() -> Path:
    """The run directory of the server that this stub belongs to. It is made if it is missing."""
    return run_directory_of(server_pid())


def run_directory_of(server_pid: int) -> Path:
    """The run directory of the Triton server with this pid; `LIGHTLLM_RUN_DIR` overrides it.

    The name has the server's pid and start time, so that two servers on one machine never share one.
    """
    if override := os.environ.get(_OVERRIDE):
        return _made(Path(override))
    server = psutil.Process(server_pid)
    return _made(_base() / f"{server.pid}-{int(server.create_time())}")


def check_run_directory() -> None:
    """Raise RunDirectoryError if a server that is started now could not have a run directory."""
    override = os.environ.get(_OVERRIDE)
    directory = _made(Path(override)) if override else _base() / f"{2**22}-{int(time.time())}"
    longest = max(len(os.fsencode(address)) for address in _addresses(directory))
    if longest > MAX_SOCKET_PATH:
        raise RunDirectoryError(
            f"sockets in {directory} would have paths of {longest} bytes; allowed: at most {MAX_SOCKET_PATH}"
            f"{_ADVICE} with a shorter path"
        )
    probe = directory.parent / f".check-{os.getpid()}"
    try:
        probe.write_bytes(b"vitals")
    except OSError as error:
        raise RunDirectoryError(f"no file can be written in {directory.parent}: {error.strerror}{_ADVICE}") from None
    finally:
        probe.unlink(missing_ok=True)


def _base() -> Path:
    """The directory of this user's run directories."""
    try:
        base = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()) / f"lightllm-{os.getuid()}"
    except OSError as error:  # no directory for temporary files can be written to
        raise RunDirectoryError(f"there is no directory for the server's sockets: {error.strerror}{_ADVICE}") from None
    _made(base)
    status = base.lstat()
    if status.st_uid != os.getuid() or not stat.S_ISDIR(status.st_mode) or status.st_mode & 0o077:
        raise RunDirectoryError(f"{base} is not a directory that only this user may use{_ADVICE}")
    return base


def _made(directory: Path) -> Path:
    try:
        directory.mkdir(exist_ok=True, parents=bool(os.environ.get(_OVERRIDE)), mode=0o700)
    except OSError as error:
        raise RunDirectoryError(f"{directory} cannot be made: {error.strerror}{_ADVICE}") from None
    return directory


def remove_run_directory(directory: Path) -> None:
    """Remove what the processes of a server that has ended left there, and the directory unless the user named it."""
    shared = (directory / KEY_FILE, load_file(directory), guard_lock(directory))
    for path in (*directory.glob("*.vitals"), *map(Path, _addresses(directory)), *shared):
        path.unlink(missing_ok=True)
    if not os.environ.get(_OVERRIDE):
        with contextlib.suppress(FileNotFoundError):  # another server, which starts, has just removed it
            _remove(directory)


def remove_stale_run_directories() -> None:
    """Remove the run directories of servers that are gone, and have no guard that would."""
    if os.environ.get(_OVERRIDE):
        return
    for directory in _base().iterdir():
        pid, _, created = directory.name.partition("-")
        with contextlib.suppress(OSError, ValueError, psutil.AccessDenied):
            try:
                alive = int(psutil.Process(int(pid)).create_time()) == int(created)
            except psutil.NoSuchProcess:
                alive = False
            if not alive and not _is_guarded(directory):
                _remove(directory)


def _is_guarded(directory: Path) -> bool:
    """Whether a guard holds its lock."""
    try:
        with guard_lock(directory).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def engine_address(directory: Path) -> str:
    """Where rank 0's worker listens for EngineClients."""
    return str(directory / "engine")


def return_address(directory: Path) -> str:
    """Where the generation step listens for the detokenizer's return channel."""
    return str(directory / "returns")


def guard_lock(directory: Path) -> Path:
    """The file that the server's guard holds locked."""
    return directory / "guard"


def batches_address(engine: str) -> str:
    """Where rank 0 of the engine at this address listens for the other ranks."""
    return f"{engine}.batches"


def rendezvous_file(engine: str) -> str:
    """The file through which the ranks of the engine at this address find each other; each start makes it anew."""
    return f"{engine}.ranks"


def load_file(directory: Path) -> Path:
    """Where the processes of this server share the length of the engine's queue (engine_load.py)."""
    return directory / "load"


def remove_addresses(directory: Path) -> None:
    """Remove the sockets and files of an engine and its generation step that have ended."""
    for path in _addresses(directory):
        Path(path).unlink(missing_ok=True)


def _addresses(directory: Path) -> tuple[str, ...]:
    engine = engine_address(directory)
    return engine, batches_address(engine), rendezvous_file(engine), return_address(directory)


def _remove(directory: Path) -> None:
    for file in directory.iterdir():
        file.unlink(missing_ok=True)
    directory.rmdir()
