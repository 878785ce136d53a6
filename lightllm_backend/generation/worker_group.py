# SPDX-License-Identifier: Apache-2.0
"""WorkerGroup: the worker processes of one start of the engine, one for each rank on this host. No torch.

A worker reports its state on standard output, one line each: `ready`, or `error: …` before it gives up. Its standard
input is the parent pipe: when the process that started it ends, for any reason, the worker reads end-of-file and exits.
"""

from __future__ import annotations

import logging
import os
import subprocess
import threading
import time
from pathlib import Path
from queue import SimpleQueue

from lightllm_backend.config import EngineConfig
from lightllm_backend.environment import package_environment
from lightllm_backend.messages.run_directory import rendezvous_file

STOP_SECONDS = 10.0  # a worker ends a step of seconds first; Triton server itself allows 30

log = logging.getLogger(__name__)


class EngineStartError(RuntimeError):
    """A worker gave up before it was ready; the message is the worker's own."""


class WorkerGroup:
    """Owns the processes, which live and die together: without one rank, the others would wait for it for ever."""

    def __init__(self, config: EngineConfig, address: str) -> None:
        Path(rendezvous_file(address)).unlink(missing_ok=True)
        self._told: SimpleQueue[tuple[int, str | None]] = SimpleQueue()  # rank and line; None: its output has ended
        self._workers: dict[int, subprocess.Popen[str]] = {}  # by rank
        self._has_peers = config.tp > 1
        environment = worker_environment(config)
        # A stub embeds its own interpreter, so sys.executable says nothing there.
        python = config.worker_python or "python3"
        try:
            for rank in config.host_ranks:
                self._start(rank, [python, "-m", "lightllm_backend.worker.main", address, str(rank)], environment)
        except (OSError, RuntimeError) as error:  # RuntimeError: no thread can be started
            self.kill()
            raise EngineStartError(f"rank {rank} cannot be started with {python}: {error}") from error

    def _start(self, rank: int, command: list[str], environment: dict[str, str]) -> None:
        # A stub's own encoding is ASCII whatever the locale; a worker's is UTF-8 (see worker_environment).
        worker = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8", errors="replace"
        )
        self._workers[rank] = worker
        threading.Thread(target=self._read, args=(rank, worker), name=f"rank-{rank}", daemon=True).start()

    @property
    def pids(self) -> list[int]:
        """The process ids, in order of rank."""
        return [worker.pid for worker in self._workers.values()]

    def wait_ready(self) -> None:
        """Block until all are ready. If one gives up, end all and raise EngineStartError with its error."""
        waiting = set(self._workers)
        while waiting:
            rank, line = self._told.get()
            if line == "ready":
                waiting.discard(rank)
            elif line is None or line.startswith("error: "):
                reason = f"{self._end_of(rank)} before it was ready; its log says why" if line is None else line
                self.kill()
                prefix = f"rank {rank}: " if self._has_peers else ""
                raise EngineStartError(prefix + reason.removeprefix("error: "))

    def wait_end(self) -> str:
        """Block until one has ended. Returns which one, and how it ended, in words."""
        while True:
            rank, line = self._told.get()
            if line is None:
                return (f"rank {rank}: " if self._has_peers else "") + self._end_of(rank)

    def stop(self) -> None:
        """Let all end by themselves, and kill those that do not; blocks."""
        for worker in self._workers.values():
            assert worker.stdin is not None
            worker.stdin.close()
        deadline = time.monotonic() + STOP_SECONDS
        for worker in self._workers.values():
            try:
                worker.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.kill()

    def kill(self) -> None:
        """Kill all."""
        for worker in self._workers.values():
            worker.kill()
        for worker in self._workers.values():
            worker.wait()

    def _read(self, rank: int, worker: subprocess.Popen[str]) -> None:
        assert worker.stdout is not None
        try:
            for line in worker.stdout:
                self._told.put((rank, line.strip()))
        except Exception:
            log.exception("the status of rank %d cannot be read; it is ended", rank)
            worker.kill()
        finally:  # or wait_ready() and wait_end() would block for ever
            self._told.put((rank, None))

    def _end_of(self, rank: int) -> str:
        return f"the worker ended with exit code {self._workers[rank].wait()}"


def worker_environment(config: EngineConfig) -> dict[str, str]:
    """The environment of a worker: without the server's own libraries, with all settings."""
    environment = package_environment(os.environ)
    # By default threads spin at OpenMP's barriers. On cores that the server shares, a spinning thread takes the core
    # that the awaited thread needs, which made a CPU engine ten times slower.
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", "10000")  # some 0.1 ms, which bridges a step's gaps
    if config.nnodes == 1:  # all ranks are on this machine, whatever its host name resolves to
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
        environment.setdefault("NCCL_SOCKET_IFNAME", "lo")
    return environment | config.environment()
