# SPDX-License-Identifier: Apache-2.0
"""An engine of several processes, an EngineSupervisor and its workers, with a client in this process."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from lightllm_backend.config import EngineConfig
from lightllm_backend.generation.engine_client import EngineClient
from lightllm_backend.generation.supervisor import EngineSupervisor
from lightllm_backend.request import Request, SamplingParams, TokenChunk

TIMEOUT = 120.0


@dataclass
class Engine:
    supervisor: EngineSupervisor
    client: EngineClient

    def answer(
        self, prompts: Sequence[list[int]], sampling: SamplingParams | Sequence[SamplingParams]
    ) -> list[Pending]:
        """All prompts at once, to their ends."""
        params = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else sampling
        pending = [self.submit(prompt, one) for prompt, one in zip(prompts, params, strict=True)]
        for one in pending:
            assert one.ended.wait(TIMEOUT)
            assert one.chunks[-1].error is None, one.chunks[-1].error
        return pending

    def submit(self, prompt: list[int], sampling: SamplingParams) -> Pending:
        pending = Pending()
        self.client.submit(Request(self.client.new_uid(), tuple(prompt), sampling), pending.on_chunk)
        return pending


class Pending:
    """A request on its way."""

    def __init__(self) -> None:
        self.chunks: list[TokenChunk] = []
        self.started = threading.Event()
        self.ended = threading.Event()

    def on_chunk(self, chunk: TokenChunk) -> None:
        self.chunks.append(chunk)
        self.started.set()
        if chunk.finish_reason is not None:
            self.ended.set()

    @property
    def tokens(self) -> list[int]:
        return [token for chunk in self.chunks for token in chunk.token_ids]

    @property
    def log_probs(self) -> list[float]:
        return [value for chunk in self.chunks for value in chunk.log_probs]


def configuration(directory: Path, tp: int, **changes: object) -> EngineConfig:
    settings = {
        "dtype": "float32", "device": "cpu", "running_max_req_size": 8, "max_total_token_num": 1024,
        "worker_python": sys.executable, **changes,
    }  # fmt: skip
    return EngineConfig(model_dir=str(directory), tp=tp, **settings)


@contextlib.contextmanager
def started(config: EngineConfig, on_restart: Callable[[], None] = lambda: None) -> Iterator[Engine]:
    with tempfile.TemporaryDirectory(prefix="lightllm-") as run_directory:
        address = str(Path(run_directory, "engine"))
        supervisor = EngineSupervisor(config, address, on_restart)
        client = None
        try:
            supervisor.wait_ready()
            client = EngineClient(address)
            client.wait_ready(TIMEOUT)
            yield Engine(supervisor, client)
        finally:
            if client:
                client.close()
            supervisor.stop()


def further_host(
    config: EngineConfig, log: Path, prefix: Sequence[str] = (), **variables: str
) -> subprocess.Popen[bytes]:
    """The command of host 1, appending to `log`. prefix: the beginning of its command line."""
    settings = replace(config, node_rank=1, worker_python=None).environment()
    with log.open("ab") as output:
        return subprocess.Popen(
            [*prefix, sys.executable, "-m", "lightllm_backend.worker"],
            env={**os.environ, **settings, **variables}, stdout=output, stderr=output, cwd=Path(__file__).parents[2],
        )  # fmt: skip


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the process and all below it, as when a host loses power."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for one in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()


def workers() -> list[psutil.Process]:
    """Children of this process that are workers and still run; those of servers are not its own children."""
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if "lightllm_backend.worker.main" in child.cmdline():
                found.append(child)
    return found
