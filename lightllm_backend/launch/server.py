# SPDX-License-Identifier: Apache-2.0
"""Server: the tritonserver process of the launch command, with its guard. No torch."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from lightllm_backend.config import EngineConfig
from lightllm_backend.launch.guard import LAUNCHER_VARIABLE, GuardKeeper, identity
from lightllm_backend.messages.run_directory import RunDirectoryError, guard_lock, run_directory_of
from lightllm_backend.messages.vitals import forget_dead

# For the guard to kill what a dead server has left, and to remove its files.
CLEAN_UP_SECONDS = 15.0
# What Triton server shares with a stub, from a moment before it starts that.
_SHARED_MEMORY = re.compile(r"/dev/shm/triton_python_backend_shm_region_\S+$", re.MULTILINE)


@dataclass(frozen=True)
class Launch:
    """Everything needed to start the server."""

    config: EngineConfig
    model_dir: Path
    argv: list[str]
    environment: dict[str, str]
    front_environment: dict[str, str] = field(default_factory=dict)

    def address(self, port: int) -> str:
        """Return the address of a port for a client on this machine."""
        return self.config.local_address(port)


class Server:
    """A tritonserver process, in a group of its own: Ctrl-C reaches this command alone.

    The server's environment names this command, so the guard ends the server if this command dies.
    """

    def __init__(self, launch: Launch) -> None:
        launcher = identity(os.getpid())
        self._process = subprocess.Popen(
            launch.argv,
            env=launch.environment | {LAUNCHER_VARIABLE: launcher},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            umask=0o077,  # files and sockets of all processes are the server's user's alone
        )
        try:
            self.directory = run_directory_of(self._process.pid)
        except RunDirectoryError:
            self._process.kill()
            raise
        forget_dead(self.directory)  # LIGHTLLM_RUN_DIR may name what a killed server has left
        server = identity(self._process.pid, is_child=True)
        self._keeper = GuardKeeper(server, self.directory, sys.executable, launcher)
        self.keep_guard()
        self._shared_memory: set[str] = set()  # of a server that was killed
        self._waiter = threading.Thread(target=self._process.wait, name="tritonserver", daemon=True)
        self._waiter.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def keep_guard(self) -> None:
        """Start the guard if there is none, and replace one that stands still; to be called every second or so."""
        self._keeper.keep()

    def ended_within(self, seconds: float) -> bool:
        self._waiter.join(seconds)
        return not self._waiter.is_alive()

    def stop(self, seconds: float) -> bool:
        """End the server and what it leaves; return false if it had to be killed after `seconds`.

        A stub that outlives its server tells so, and may abort if it is ending at that moment.
        """
        self._note_shared_memory()
        self._process.terminate()  # which ends it at once, early in its start
        has_ended = self.ended_within(seconds)
        self._note_shared_memory()
        with contextlib.suppress(ProcessLookupError):  # nothing is left of its group
            os.killpg(self._process.pid, signal.SIGKILL)
        return has_ended

    def _note_shared_memory(self) -> None:
        with contextlib.suppress(OSError):  # it has ended
            self._shared_memory.update(_SHARED_MEMORY.findall(Path(f"/proc/{self.pid}/maps").read_text()))

    def end(self) -> int:
        """Wait until the server is dead and nothing of it is left; return its exit code as a shell reports it."""
        self._waiter.join()
        end = time.monotonic() + CLEAN_UP_SECONDS
        while guard_lock(self.directory).exists() and time.monotonic() < end:
            self.keep_guard()
            time.sleep(0.05)
        for path in self._shared_memory:  # the guard knows that of stubs that it has seen
            Path(path).unlink(missing_ok=True)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:  # as a container's first process, this one gets the orphans
                pass
        code = self._process.returncode
        return 128 - code if code < 0 else code
