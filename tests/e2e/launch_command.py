# SPDX-License-Identifier: Apache-2.0
"""The launch command as a process, and a flood of requests to its server."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil

from lightllm_backend.environment import STUB
from lightllm_backend.launch.guard import identity, is_alive
from tests.e2e.server import REPOSITORY, engine_environment
from tests.free_ports import free_ports
from tests.polling import poll

PROGRAM = """
from lightllm_backend import serve
from lightllm_backend.launch import health
health.PROBE_SECONDS = {probe_seconds}
serve.command()
"""
PATTERNS = {
    "tritonserver": r"/tritonserver ",
    "worker-0": r"lightllm_backend\.worker\.main \S+ 0 ",
    "worker-1": r"lightllm_backend\.worker\.main \S+ 1 ",
    "guard": r"lightllm_backend\.launch\.guard",
}


class Traces:
    """What the processes of a server must not leave behind: themselves, shared memory and run directories."""

    def __init__(self, top: psutil.Process, base: Path) -> None:
        family = [top, *top.children(recursive=True)]
        self._processes = [identity(process.pid) for process in family]
        arguments = [argument for process in family for argument in command_line(process)]
        self._regions = [Path("/dev/shm", name) for name in arguments if "shm_region" in name]
        assert self._regions or STUB not in " ".join(arguments)
        self._directories = list(base.iterdir()) if base.exists() else []

    def left(self) -> list[str]:
        """What is still there."""
        files = [str(path) for path in (*self._regions, *self._directories) if path.exists()]
        return [process for process in self._processes if is_alive(process)] + files


class LaunchCommand:
    """The launch command on free ports, from construction to `stop`, with run directories of its own.

    probe_seconds: shorter than by default, so that a flood of seconds is to it what one of minutes is to a user's.
    """

    def __init__(self, folder: Path, probe_seconds: float = 10.0, **settings: object) -> None:
        self.http_port, self.grpc_port, self.metrics_port = free_ports(3)
        ports = {"http_port": self.http_port, "grpc_port": self.grpc_port, "metrics_port": self.metrics_port}
        self._runtime = tempfile.TemporaryDirectory(prefix="lightllm-")  # paths of sockets are short
        environment = engine_environment({**settings, **ports}) | {"XDG_RUNTIME_DIR": self._runtime.name}
        self.base = Path(self._runtime.name, f"lightllm-{os.getuid()}")
        self.log_path = folder / "log"
        with self.log_path.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM.format(probe_seconds=probe_seconds)],
                env=environment, stdout=output, stderr=output, cwd=REPOSITORY.parent,
            )  # fmt: skip

    @property
    def grpc_url(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    def wait_ready(self, times: int = 1) -> LaunchCommand:
        assert poll(lambda: self.log().count("ready after") >= times or self.process.poll() is not None, 300), (
            self.log()
        )
        assert self.process.poll() is None, self.log()
        return self

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def find(self, role: str) -> psutil.Process:
        """A process by what it is: "launcher", "tritonserver", "worker-0", "guard", or a model."""
        if role == "launcher":
            return psutil.Process(self.process.pid)
        return next(self.find_all(role))

    def find_all(self, role: str) -> Iterator[psutil.Process]:
        pattern = PATTERNS.get(role, rf"{STUB} .*/{role}/")
        for process in psutil.Process(self.process.pid).children(recursive=True):
            if re.search(pattern, " ".join(command_line(process)) + " "):
                yield process

    def traces(self) -> Traces:
        return Traces(psutil.Process(self.process.pid), self.base)

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.terminate()
        return self.process.wait(120)


def command_line(process: psutil.Process) -> list[str]:
    """The process's arguments; none of one that has ended."""
    try:
        arguments: list[str] = process.cmdline()
    except psutil.NoSuchProcess:
        return []
    return arguments


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
