# SPDX-License-Identifier: Apache-2.0
"""EngineSupervisor: starts the worker process, keeps it up, and stops it. Lives in the generation step. No torch.

The worker's standard output tells its state, a line each: `ready`, or `error: …` before it gives up. Its standard input
is a leash: when the supervisor's process ends, however it ends, the worker reads end-of-file and exits.
"""

from __future__ import annotations

import logging
import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

from lightllm_backend.config import EngineConfig
from lightllm_backend.tritonserver import original_environment

STOP_SECONDS = 10.0
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 30.0

log = logging.getLogger(__name__)


class EngineStartError(RuntimeError):
    """The worker gave up before it was ready; the message is the worker's own."""


class EngineSupervisor:
    """Owns the worker process: one that dies after it was ready is started again, with growing pauses."""

    def __init__(self, config: EngineConfig, address: str, on_restart: Callable[[], None] = lambda: None) -> None:
        self._config = config
        self._address = address
        self._on_restart = on_restart
        self._stopping = threading.Event()
        self._worker = self._start()
        self._watcher = threading.Thread(target=self._watch, name="engine-supervisor", daemon=True)

    def wait_ready(self) -> None:
        """Block until the worker is ready; EngineStartError with the worker's error if it gives up."""
        self._read_state(self._worker)
        self._watcher.start()

    @property
    def pid(self) -> int:
        return self._worker.pid

    def stop(self) -> None:
        self._stopping.set()
        self._end(self._worker)
        if self._watcher.is_alive():
            self._watcher.join()

    def _start(self) -> subprocess.Popen[str]:
        # A stub embeds its own interpreter, so sys.executable says nothing there.
        python = self._config.worker_python or "python3"
        command = [python, "-m", "lightllm_backend.engine.worker", self._address]
        return subprocess.Popen(
            command, env=worker_environment(self._config), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def _read_state(self, worker: subprocess.Popen[str]) -> None:
        assert worker.stdout is not None
        for line in worker.stdout:
            if line.strip() == "ready":
                return
            if line.startswith("error: "):
                worker.wait()
                raise EngineStartError(line.removeprefix("error: ").strip())
        raise EngineStartError(f"the worker ended with exit code {worker.wait()} before it was ready; its log says why")

    def _watch(self) -> None:
        pause = FIRST_PAUSE_SECONDS
        while True:
            code = self._worker.wait()
            if self._stopping.is_set():
                return
            log.error("the worker ended with exit code %d; starting it again in %.1f s", code, pause)
            if self._stopping.wait(pause):
                return
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
            self._on_restart()
            self._worker = self._start()
            if self._stopping.is_set():  # since the pause; stop() may have seen the worker before this one
                self._end(self._worker)
                return
            try:
                self._read_state(self._worker)
                pause = FIRST_PAUSE_SECONDS
            except EngineStartError as error:
                log.error("the worker could not be started again: %s", error)

    @staticmethod
    def _end(worker: subprocess.Popen[str]) -> None:
        assert worker.stdin is not None
        worker.stdin.close()
        try:
            worker.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()


def worker_environment(config: EngineConfig) -> dict[str, str]:
    """The environment as it was before the server's own libraries were put in front, with all settings."""
    environment = original_environment(os.environ)
    package_parent = str(Path(__file__).resolve().parents[2])
    paths = [package_parent, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    # Threads that spin at OpenMP's barriers, its default, cost a CPU engine a factor of ten where cores are shared with
    # the server: they take the core that the awaited thread needs.
    environment.setdefault("OMP_WAIT_POLICY", "passive")
    environment["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    return environment | config.environment()
