# SPDX-License-Identifier: Apache-2.0
"""The run directory: the private directory in which the processes of one server find each other. No torch."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from pathlib import Path

import psutil

from lightllm_backend.messages.seal import KEY_FILE


def run_directory() -> Path:
    """The run directory of the server that this stub belongs to: its parent process. It is made if it is missing."""
    return run_directory_of(os.getppid())


def run_directory_of(server_pid: int) -> Path:
    """The run directory of the Triton server with this pid; `LIGHTLLM_RUN_DIR` overrides it.

    The name has the server's pid and start time, so that two servers on one machine never share one.
    """
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
    """Remove this server's run directory if no model uses it any more, as for the last one that leaves."""
    if os.environ.get("LIGHTLLM_RUN_DIR"):
        return
    directory = run_directory()
    with contextlib.suppress(OSError):
        # Models that go on, and those that start, have their vitals here: they share the key with later ones.
        if {file.name for file in directory.iterdir()} <= {KEY_FILE, load_file(directory).name}:
            _remove(directory)


def remove_stale_run_directories() -> None:
    """Remove the run directories of servers that are gone."""
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


def engine_address(directory: Path) -> str:
    """Where rank 0's worker listens for EngineClients."""
    return str(directory / "engine")


def return_address(directory: Path) -> str:
    """Where the generation step listens for the detokenizer's return channel."""
    return str(directory / "returns")


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
    engine = engine_address(directory)
    for path in (engine, batches_address(engine), rendezvous_file(engine), return_address(directory)):
        Path(path).unlink(missing_ok=True)


def _remove(directory: Path) -> None:
    for file in directory.iterdir():
        file.unlink()
    directory.rmdir()
