# SPDX-License-Identifier: Apache-2.0
"""A real tritonserver with this repository's models, on free ports, for as long as a test needs it."""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from lightllm_backend.launch.http_sockets import enlarge_message_buffers
from lightllm_backend.triton_server.executable import command, completion_options
from tests.free_ports import free_ports
from tests.polling import poll

REPOSITORY = Path(__file__).resolve().parents[2] / "model_repository"
START_SECONDS = 180.0
STOP_SECONDS = 60.0


class ServerEnded(RuntimeError):
    """The server ended before it was ready; the message is its log."""

    def __init__(self, exit_code: int, log: str) -> None:
        super().__init__(f"tritonserver ended with exit code {exit_code} before it was ready:\n{log}")
        self.exit_code = exit_code


class TritonServer:
    """Owns one server process from construction to `stop`. `settings` are engine settings by their lower-case names."""

    def __init__(
        self, log: Path, arguments: Sequence[str] = (), repository: Path = REPOSITORY, **settings: object
    ) -> None:
        self.http_port, self.grpc_port, self.metrics_port = free_ports(3)
        ports = [
            f"--http-port={self.http_port}",
            f"--grpc-port={self.grpc_port}",
            f"--metrics-port={self.metrics_port}",
            "--http-address=127.0.0.1",
            "--grpc-address=127.0.0.1",
            "--metrics-address=127.0.0.1",
            "--exit-timeout-secs=5",
            *completion_options(repository),
        ]
        argv, environment = command(
            [f"--model-repository={repository}", *ports, *arguments], engine_environment(settings)
        )
        self.log_path = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(argv, env=environment, stdout=output, stderr=subprocess.STDOUT)

    @property
    def grpc_url(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    @property
    def http_url(self) -> str:
        return f"127.0.0.1:{self.http_port}"

    def wait_ready(self, limit: float = START_SECONDS) -> TritonServer:
        if not poll(lambda: self.process.poll() is not None or self.is_ready(), limit):
            raise TimeoutError(f"tritonserver is not ready after {limit} s:\n{self.log()}")
        if self.process.poll() is not None:
            raise ServerEnded(self.process.returncode, self.log())
        enlarge_message_buffers(self.process.pid)  # as the launch command does, or answers of a flood are lost
        return self

    def is_ready(self) -> bool:
        """Whether all its services answer; the metrics come last."""
        try:
            return get(self.http_port, "/v2/health/ready")[0] == get(self.metrics_port, "/metrics")[0] == 200
        except OSError:
            return False

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def processes(self) -> list[psutil.Process]:
        """The server, its stubs and their workers."""
        server = psutil.Process(self.process.pid)
        return [server, *server.children(recursive=True)]

    def workers(self) -> list[psutil.Process]:
        """The engine's workers, which the generation step's stub has started."""
        return [one for one in self.processes() if "lightllm_backend.worker.main" in one.cmdline()]

    def worker(self) -> psutil.Process:
        """The worker of an engine of one rank."""
        [worker] = self.workers()
        return worker

    def run_directory(self) -> Path:
        """Where the models of this server meet; each worker was told a socket's address there."""
        [directory] = {Path(worker.cmdline()[-2]).parent for worker in self.workers()}
        return directory

    def metrics(self) -> dict[str, float]:
        """All samples of our metrics, by name and labels as written there: `lightllm_requests_total{status="stop"}`."""
        return read_metrics(self.metrics_port)

    def is_idle(self) -> bool:
        """Whether no request holds anything of the engine any more."""
        now = self.metrics()
        return not any(now[f"lightllm_{name}"] for name in ("kv_tokens_used", "running_requests", "queued_requests"))

    def stop(self) -> int:
        """SIGTERM, and the exit code; a server that does not obey is killed and is an error."""
        self.process.terminate()
        try:
            return self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise


def engine_environment(settings: Mapping[str, object]) -> dict[str, str]:
    """This process's environment with these settings and no others, float32 on the CPU unless they say otherwise."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LIGHTLLM_") or name in _KEPT}
    chosen: dict[str, object] = {"worker_python": sys.executable, "dtype": "float32", "device": "cpu", **settings}
    return kept | {f"LIGHTLLM_{name.upper()}": str(value) for name, value in chosen.items()}


_KEPT = ("LIGHTLLM_CACHE", "LIGHTLLM_TRITONSERVER")


def read_metrics(port: int) -> dict[str, float]:
    status, text = get(port, "/metrics")
    assert status == 200, text
    return {name: float(value) for name, value in re.findall(r"^(lightllm_\S+?)(?:\{\})? (\S+)$", text, re.MULTILINE)}


def executions(http_port: int, model: str) -> int:
    """How often a model has been executed: once for each request that it has taken."""
    _, answer = get(http_port, f"/v2/models/{model}/stats")
    return int(json.loads(answer)["model_stats"][0]["execution_count"])


def get(port: int, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()
