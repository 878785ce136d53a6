# SPDX-License-Identifier: Apache-2.0
"""Replicas of the server on one machine, each at a loopback address of its own, and HAProxy in front of them.

The proxy runs deploy/proxy/haproxy.cfg as it is; addresses and ports come from the environment.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import psutil

from lightllm_backend.launch.health import http_call
from perf.model_directory import write_model_directory
from perf.record import ROOT
from perf.serving.systems import free_ports
from perf.shapes import LENGTHS
from perf.sleeping_engine import write_python

CONFIGURATION = ROOT / "deploy" / "proxy" / "haproxy.cfg"
MOST_REPLICAS = 4  # that the configuration lists
PROBED = {"grpc_port": "grpc", "openai_port": "openai"}  # the backends with a probe, by port; the others follow them
START_SECONDS = 300.0
STOP_SECONDS = 120.0
LOOK_SECONDS = 0.05


def haproxy() -> str | None:
    """Return HAProxy's executable, or None if there is none: $HAPROXY, on PATH, or where Debian puts it."""
    path = os.environ.get("PATH", os.defpath) + os.pathsep + "/usr/sbin"
    return shutil.which(os.environ.get("HAPROXY", "haproxy"), path=path)


def haproxy_version() -> str:
    """Return the version, for example 2.6.12-1+deb12u4."""
    said = subprocess.run([haproxy() or "haproxy", "-v"], capture_output=True, text=True, check=True).stdout
    return said.split()[2]


def wait_until(condition: Callable[[], object], what: str, limit: float = START_SECONDS) -> None:
    """Wait for a condition; raise TimeoutError, saying what did not happen, after `limit` seconds."""
    end = time.monotonic() + limit
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {limit:g} s")
        time.sleep(LOOK_SECONDS)


class Replica:
    """The launch command at a loopback address of its own. It may be started again after it has ended."""

    def __init__(self, number: int, ports: Mapping[str, int], settings: Mapping[str, object], log: Path) -> None:
        self.name = f"replica-{number}"
        self.address = f"127.0.0.{10 + number}"  # Linux takes all of 127.0.0.0/8 as its own
        self.log = log
        self._options = [f"--{name}={value}" for name, value in {"host": self.address, **settings, **ports}.items()]
        self.http_address = f"{self.address}:{ports['http_port']}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "lightllm_backend.serve", *self._options],
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT,
            )  # fmt: skip

    def wait_ready(self) -> None:
        wait_until(self._answers, f"{self.name} is ready")

    def _answers(self) -> bool:
        assert self._process is not None, "it has been started"
        if self._process.poll() is not None:
            lines = self.log.read_text(errors="replace").splitlines()[-15:]
            raise RuntimeError("\n".join([f"{self.name} ended with exit code {self._process.returncode}:", *lines]))
        with contextlib.suppress(OSError):
            return http_call(self.http_address, "POST", "/v2/models/health/infer", '{"inputs": []}', 10)[0] == 200
        return False

    def processes(self) -> list[psutil.Process]:
        """The launch command and all that has descended from it; none if it does not run."""
        if self._process is None or self._process.poll() is not None:
            return []
        top = psutil.Process(self._process.pid)
        return [top, *top.children(recursive=True)]

    def worker(self) -> psutil.Process:
        """The engine's worker."""
        [worker] = [one for one in self.processes() if "lightllm_backend.worker.main" in one.cmdline()]
        return worker

    def kill(self) -> None:
        """Kill every process at once, as when the machine fails."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait()

    def stop(self) -> int:
        """SIGTERM, upon which requests that run may end; return the exit code."""
        if self._process is None:
            return 0
        if self._process.poll() is None:
            self._process.terminate()
        try:
            return self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            raise


class Proxy:
    """HAProxy, from construction to `stop`. Its own ports are on 127.0.0.1."""

    def __init__(self, executable: str, ports: Mapping[str, int], folder: Path) -> None:
        self.grpc_port, self.http_port, self.openai_port, self.metrics_port = free_ports(4)
        self.log = folder / "haproxy.log"
        self._probed = [backend for port, backend in PROBED.items() if port in ports]
        self._socket = folder / "admin"
        environment = {
            **os.environ,
            "LISTEN": "127.0.0.1",
            "LISTEN_GRPC": str(self.grpc_port),
            "LISTEN_HTTP": str(self.http_port),
            "LISTEN_OPENAI": str(self.openai_port),
            "LISTEN_METRICS": str(self.metrics_port),
            "ADMIN_SOCKET": str(self._socket),
            **{name.upper(): str(port) for name, port in ports.items()},
            **{f"REPLICA_{number}": f"127.0.0.{10 + number}" for number in range(1, MOST_REPLICAS + 1)},
        }
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                [executable, "-db", "-f", str(CONFIGURATION)],
                env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            )  # fmt: skip

    @property
    def grpc_url(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    def wait_up(self, names: Sequence[str]) -> None:
        """Wait until exactly these replicas are up."""
        wait_until(lambda: self.up() == set(names), f"the proxy sees {', '.join(names) or 'no replica'} up")

    def up(self) -> set[str]:
        """The replicas that get requests."""
        try:
            rows = self.statistics()
        except OSError:
            return set()
        states: dict[str, set[bool]] = {}
        for row in rows:
            if row["pxname"] in self._probed and row["svname"].startswith("replica-"):
                states.setdefault(row["svname"], set()).add(row["status"].startswith("UP"))
        return {name for name, seen in states.items() if seen == {True}}

    def is_down(self, name: str) -> bool:
        """Whether a replica has been ejected; of one that is drained, whether its probe fails."""
        rows = [row for row in self.statistics() if row["pxname"] in self._probed and row["svname"] == name]
        return all(
            row["status"].startswith("DOWN") or (row["status"] == "DRAIN" and row["check_status"] != "L7OK")
            for row in rows
        )

    def drain(self, name: str) -> None:
        """Give a replica no new requests, and wait until it has answered those that it has."""
        for backend in self._probed:
            self.command(f"set server {backend}/{name} state drain")
        wait_until(lambda: self.sessions(name) == 0, f"{name} has answered its requests", STOP_SECONDS)

    def undrain(self, name: str) -> None:
        for backend in self._probed:
            self.command(f"set server {backend}/{name} state ready")

    def sessions(self, name: str) -> int:
        """The requests that a replica has now."""
        return sum(int(row["scur"]) for row in self.statistics() if row["svname"] == name)

    def repeated(self) -> int:
        """How many requests the proxy has sent anew, since the replica had not answered."""
        return sum(int(row["wretr"] or 0) for row in self.statistics() if row["svname"] == "BACKEND")

    def requests(self, backend: str) -> dict[str, int]:
        """How many requests of a backend each replica has had."""
        rows = [row for row in self.statistics() if row["pxname"] == backend and row["svname"].startswith("replica-")]
        return {row["svname"]: int(row["stot"]) for row in rows}

    def statistics(self) -> list[dict[str, str]]:
        """A row for each proxy, server and listener, by column."""
        header, *lines = self.command("show stat").removeprefix("# ").strip().splitlines()
        return [dict(zip(header.split(","), line.split(","), strict=False)) for line in lines]

    def command(self, line: str) -> str:
        """Send a command to the administrator's socket; return the answer."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(10)
            connection.connect(str(self._socket))
            connection.sendall(line.encode() + b"\n")
            return b"".join(iter(lambda: connection.recv(1 << 16), b"")).decode()

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(STOP_SECONDS)


class Fleet:
    """Replicas, of which any number may run, and the proxy in front of them. front: whether they have OpenAI's API."""

    def __init__(self, settings: Mapping[str, object], folder: Path, executable: str, front: bool) -> None:
        names = ("http_port", "grpc_port", "metrics_port", *(["openai_port"] if front else []))
        ports = dict(zip(names, free_ports(len(names)), strict=True))
        self.replicas = [
            Replica(number, ports, settings, folder / f"replica-{number}.log") for number in range(1, MOST_REPLICAS + 1)
        ]
        self.proxy = Proxy(executable, ports, folder)

    def start(self, replicas: Sequence[Replica]) -> None:
        """Start these at once, and wait until the proxy sees exactly them and those that run already."""
        running = {replica.name for replica in self.replicas if replica.processes()}
        for replica in replicas:
            replica.start()
        for replica in replicas:
            replica.wait_ready()
        self.proxy.wait_up(sorted(running | {replica.name for replica in replicas}))

    def stop(self) -> None:
        self.proxy.stop()
        for replica in self.replicas:
            replica.stop()


@contextlib.contextmanager
def running_fleet(settings: Mapping[str, object], folder: Path, front: bool = True) -> Iterator[Fleet]:
    """A fleet of which nothing runs yet but the proxy; all of it is stopped at the end."""
    executable = haproxy()
    if executable is None:
        raise FileNotFoundError("there is no haproxy; on Debian and Ubuntu: apt-get install haproxy (or set HAPROXY)")
    fleet = Fleet(settings, folder, executable, front)
    try:
        yield fleet
    finally:
        fleet.stop()


def sleeping_settings(folder: Path, slowdown: float = 1.0) -> dict[str, object]:
    """The settings of a replica whose engine only tells the time (perf/sleeping_engine.py), as LLaMA-7B on an H200."""
    write_model_directory("llama-7b", folder / "llama-7b")
    python = write_python(folder / "python", SLEEPING_ENGINE_SLOWDOWN=slowdown)
    return {"worker_python": python, "model_dir": folder / "llama-7b", "load_format": "dummy", **LENGTHS}
