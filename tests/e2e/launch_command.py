# SPDX-License-Identifier: Apache-2.0
"""The launch command as a process, and a flood of requests to its server."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import psutil

from tests.e2e.server import REPOSITORY, engine_environment, free_ports
from tests.polling import poll

PROGRAM = """
from lightllm_backend import serve
from lightllm_backend.launch import health
health.PROBE_SECONDS, health.LATE_BEAT_SECONDS = {probe_seconds}, {late_beat_seconds}
serve.command()
"""


class LaunchCommand:
    """The launch command on free ports, from construction to `stop`.

    Its times are shorter than by default, so that a flood of seconds is to it what a flood of minutes is to a user's.
    """

    def __init__(self, log: Path, probe_seconds: float, late_beat_seconds: float, **settings: object) -> None:
        self.http_port, self.grpc_port, metrics_port = free_ports(3)
        ports = {"http_port": self.http_port, "grpc_port": self.grpc_port, "metrics_port": metrics_port}
        environment = engine_environment({**settings, **ports})
        program = PROGRAM.format(probe_seconds=probe_seconds, late_beat_seconds=late_beat_seconds)
        self.log_path = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-c", program], env=environment, stderr=output, cwd=REPOSITORY.parent
            )

    @property
    def grpc_url(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    def wait_ready(self) -> LaunchCommand:
        assert poll(lambda: "ready after" in self.log() or self.process.poll() is not None, 120), self.log()
        assert self.process.poll() is None, self.log()
        return self

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def find(self, role: str) -> psutil.Process:
        """A process by what it is: "tritonserver", "worker", or a model."""
        patterns = {"tritonserver": r"/tritonserver ", "worker": r"lightllm_backend\.worker\.main"}
        pattern = patterns.get(role, rf"triton_python_backend_stub .*/{role}/")
        for process in psutil.Process(self.process.pid).children(recursive=True):
            if re.search(pattern, " ".join(process.cmdline()) + " "):
                return process
        raise AssertionError(f"there is no {role}")

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(120)


async def flood(port: int, count: int, max_tokens: int, seconds: float) -> Counter[str]:
    """Send `count` requests at once, and say how they have ended: a status, or what became of the connection."""

    async def request() -> str:
        body = json.dumps({"text_input": "Once upon a time", "max_tokens": max_tokens, "ignore_eos": True}).encode()
        head = f"POST /v2/models/lightllm/generate HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(head.encode() + body)
            status = (await asyncio.wait_for(reader.readline(), seconds)).decode()
            writer.close()
        except TimeoutError:
            return "no answer"
        except OSError:
            return "closed"
        return status.split(" ")[1] if status else "closed"

    return Counter(await asyncio.gather(*(request() for _ in range(count))))
