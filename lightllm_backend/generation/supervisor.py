# SPDX-License-Identifier: Apache-2.0
"""EngineSupervisor: starts, restarts and stops the workers. It runs in the generation step. No torch."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from lightllm_backend.config import EngineConfig
from lightllm_backend.generation.worker_group import EngineStartError, WorkerGroup

# Between a failure and the next start: short after a single failure; a worker that always fails costs little.
FIRST_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 0.5, 30.0

log = logging.getLogger(__name__)


class EngineSupervisor:
    """Owns the workers. If one dies after all were ready, it starts all of them again, after growing pauses."""

    def __init__(self, config: EngineConfig, address: str, on_restart: Callable[[], None] = lambda: None) -> None:
        self._config = config
        self._address = address
        self._on_restart = on_restart
        self._stopping = threading.Event()
        self._lock = threading.Lock()  # nothing is started once `_stopping` is set
        self._group = self._start()
        self._watcher = threading.Thread(target=self._watch, name="engine-supervisor", daemon=True)

    def wait_ready(self) -> None:
        """Block until the workers are ready. Raises EngineStartError with a worker's own error if that gives up."""
        self._group.wait_ready()
        self._watcher.start()

    def keep(self) -> None:
        """Block until `stop`, and keep the workers running; a first start that fails is repeated like any other."""
        is_up = True
        try:
            self._group.wait_ready()
        except EngineStartError as error:
            log.error("the engine could not be started: %s; it is tried again in %.1f s", error, FIRST_PAUSE_SECONDS)
            is_up = False
        self._watch(is_up)

    @property
    def pids(self) -> list[int]:
        """The workers' process ids, in order of rank."""
        return self._group.pids

    def stop(self) -> None:
        """End the workers for good; blocks."""
        with self._lock:
            self._stopping.set()
        self._group.stop()
        if self._watcher.is_alive():
            self._watcher.join()

    def _start(self) -> WorkerGroup:
        with self._lock:
            if self._stopping.is_set():
                raise EngineStartError("the engine is being stopped")
            self._group = WorkerGroup(self._config, self._address)
            return self._group

    def _watch(self, is_up: bool = True) -> None:
        pause = FIRST_PAUSE_SECONDS
        while not self._stopping.is_set():
            try:  # only this thread restarts the engine, so nothing may end it
                if is_up:
                    failure = self._group.wait_end()
                    is_up = False
                    if self._stopping.is_set():
                        return
                    log.error("%s; the engine is started again in %.1f s", failure, pause)
                self._group.kill()
                if self._stopping.wait(pause):
                    return
                self._on_restart()
                self._start().wait_ready()
                pause, is_up = FIRST_PAUSE_SECONDS, True
                log.info("the engine serves again")
            except Exception as error:
                pause = min(2 * pause, MAX_PAUSE_SECONDS)
                message = "the engine could not be started again: %s; it is tried again in %.1f s"
                log.error(message, error, pause, exc_info=not isinstance(error, EngineStartError))
