# SPDX-License-Identifier: Apache-2.0
"""The launch command as a process, with a stand-in for tritonserver: it starts, watches, replaces and stops it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from lightllm_backend.launch.guard import identity
from tests.free_ports import free_ports
from tests.launch.command_line import options
from tests.polling import poll

ROOT = Path(__file__).resolve().parents[2]

# Says that it is ready, has an engine, and answers requests until the file `broken` is there. Its engine computes while
# the file `busy` is there, and writes down how it is closed. `left` is a process that it leaves behind, which makes the
# file `orphaned` once the server is gone.
FAKE_TRITONSERVER = """
import mmap, os, signal, socket, subprocess, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from lightllm_backend.messages.engine_messages import CloseEngine, EngineInfo
from lightllm_backend.messages.run_directory import run_directory_of
from lightllm_backend.messages.vitals import Vitals
from lightllm_backend.worker.server import EngineServer
from lightllm_backend.lengths import LengthLimits

folder = Path(sys.argv[1])
options = dict(argument.split("=", 1) for argument in sys.argv[2:] if "=" in argument)
(folder / "model_dir").write_text(os.environ.get("LIGHTLLM_MODEL_DIR", ""))
with (folder / "starts").open("a") as starts:
    starts.write(f"{os.getpid()}\\n")
if (folder / "fails").exists():
    print("the server's own reason", file=sys.stderr)
    sys.exit(9)
if (folder / "crashes").exists():
    (folder / "crashes").unlink()
    os.abort()
signal.signal(signal.SIGTERM, lambda *_: (folder / "stubborn").exists() or os._exit(7))
if (folder / "loads").exists():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if (folder / "shared").exists():
        shared = Path((folder / "shared").read_text())
        shared.write_bytes(bytes(4096))
        mapped = mmap.mmap(os.open(shared, os.O_RDWR), 4096)
    time.sleep(60)

class Handler(BaseHTTPRequestHandler):
    def log_message(self, *arguments): pass
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def do_POST(self):
        unread = server.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
        (folder / "unread_milliseconds").write_text(str(unread))
        (folder / "probed").touch()
        self.send_response(400 if (folder / "broken").exists() else 200)
        self.end_headers()
        self.wfile.write(b"a stub is gone")

lengths = LengthLimits(2048, "max_req_input_len", 8192, "the model's limit")
info = EngineInfo("some/model", "bfloat16", "cuda:0", 10, (2,), lengths, 123456, {"KV pool": 3 * 2**30})
read_end, write_end = os.pipe()
directory = run_directory_of(os.getpid())
engine = EngineServer(str(directory / "engine"), info, read_end)
vitals = Vitals(directory, "worker-0")
watch = 'while kill -0 "$0"; do sleep 0.02; done; touch "$1"'
left = subprocess.Popen(["sh", "-c", watch, str(os.getpid()), folder / "orphaned"], stderr=subprocess.DEVNULL)
(folder / "left").write_text(str(left.pid))
pair = socket.socketpair()  # as between Triton server's HTTP threads
ThreadingHTTPServer.handle_error = lambda *_: None  # on a busy machine a prober hangs up before its answer
server = ThreadingHTTPServer((options["--http-address"], int(options["--http-port"])), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
while True:
    vitals.turn(busy=(folder / "busy").exists())
    for message in engine.receive(0.05):
        if isinstance(message, CloseEngine):
            with (folder / "closed").open("a") as closed:
                closed.write(f"{message.reason}, {message.drain}\\n")
"""

# Orphans become children of the command, as of the first process of a container.
PROGRAM = """
import ctypes
from lightllm_backend import serve
from lightllm_backend.launch import health, service
health.PROBE_SECONDS, service.STOP_SECONDS = 0.2, 0.5
service.FEW_MESSAGES = 1e9  # no buffer holds so many
ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
serve.command()
"""


class Command:
    """The launch command with the stand-in, from construction to `end`; probes follow each other quickly."""

    def __init__(self, folder: Path, settings: dict[str, str]) -> None:
        self.folder, self.settings = folder, settings
        script = folder / "fake_tritonserver.py"
        script.write_text(FAKE_TRITONSERVER)
        environment = {**os.environ, "LIGHTLLM_TRITONSERVER": f"{sys.executable} {script} {folder}"}
        self._runtime = tempfile.TemporaryDirectory(prefix="lightllm-")  # paths of sockets are short
        self.base = Path(self._runtime.name, f"lightllm-{os.getuid()}")
        environment |= {"PYTHONPATH": str(ROOT), "COLUMNS": "200", "XDG_RUNTIME_DIR": self._runtime.name}
        with (folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, *options(settings)], stderr=log, env=environment
            )

    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")  # a character may be half written

    def says(self, text: str, times: int = 1) -> bool:
        return poll(lambda: self.log().count(text) >= times or self.process.poll() is not None, 60) and (
            self.log().count(text) >= times
        )

    def servers(self) -> list[int]:
        """The pids of all servers that were started."""
        return [int(pid) for pid in (self.folder / "starts").read_text().split()]

    def has_no_server(self) -> bool:
        return not any(map(identity, self.servers()))

    def left(self) -> str:
        """What the last server leaves behind, if it lives."""
        return identity(int((self.folder / "left").read_text()))

    def has_left_nothing(self) -> bool:
        return not self.left() and self.has_no_server() and not list(self.base.iterdir())


Start = Callable[..., Command]


@pytest.fixture
def start(settings: dict[str, str], repository: Path, tmp_path: Path) -> Iterator[Start]:
    started: list[Command] = []

    def start(**more: object) -> Command:
        chosen = settings | {"model_repository": str(repository)} | {name: str(value) for name, value in more.items()}
        started.append(Command(tmp_path, chosen))
        return started[-1]

    yield start
    for command in started:
        command.process.kill()
        command.process.wait()
        assert poll(command.has_no_server)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_says_what_was_chosen_and_stops_when_it_is_asked_to(
    start: Start, tmp_path: Path, number: signal.Signals
) -> None:
    command = start()
    assert command.says("curl")
    said, settings = command.log(), command.settings
    for fact in ("some/model", "cuda:0, bfloat16", "123,456 tokens, 3.00 GiB", settings["grpc_port"]):
        assert fact in said
    lengths = "at most 2,048 prompt tokens (max_req_input_len), 8,192 in all (the model's limit)"
    assert lengths in " ".join(said.replace("│", " ").split())
    assert f"curl 127.0.0.1:{settings['http_port']}/v2/models/lightllm/generate -d" in said
    assert (tmp_path / "model_dir").read_text() == settings["model_dir"]
    assert poll((tmp_path / "probed").exists)
    assert (tmp_path / "unread_milliseconds").read_text() == "60000"
    assert re.search(r"warning: answers over HTTP may be lost when more than \d{3,} requests end at once", said)
    command.process.send_signal(number)
    assert command.process.wait(60) == 0
    assert "tritonserver has ended, with exit code 7; no request ran" in command.log()
    assert "error" not in command.log()
    assert set((tmp_path / "closed").read_text().splitlines()) == {"the server is shutting down, True"}
    assert command.has_left_nothing()


def test_the_front_runs_beside_it(start: Start) -> None:
    [port] = free_ports(1)
    command = start(openai_port=port, log_format="json")

    def answers() -> bool:
        with socket.socket() as probe:
            probe.settimeout(20)
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return False
            probe.sendall(b"GET /v1/models HTTP/1.1\r\nhost: front\r\nconnection: close\r\n\r\n")
            return probe.recv(100).startswith(b"HTTP/1.1 200")

    assert command.says("curl")
    assert f"http://127.0.0.1:{port}/v1" in command.log()
    assert poll(answers, 60), command.log()
    command.process.terminate()
    assert command.process.wait(60) == 0
    lines = [json.loads(line) for line in command.log().splitlines()]
    said = {line["message"]: line for line in lines if line["process"] == "launch"}
    assert said["the settings in effect"]["settings"]["front"] == f"http://127.0.0.1:{port}/v1"
    assert {line["level"] for line in said.values()} == {"info", "warning"}
    assert not answers()


# Replaced


def test_a_server_that_cannot_start_is_not_started_again(start: Start, tmp_path: Path) -> None:
    (tmp_path / "fails").touch()
    command = start()
    assert command.says("error: tritonserver has ended, with exit code 9")
    assert command.process.wait(60) == 1
    assert "the server's own reason" in command.log()
    assert "error: tritonserver ended before it was ready; the lines above say why" in command.log()
    assert len(command.servers()) == 1


def test_a_server_that_crashes_while_it_loads_is_started_again(start: Start, tmp_path: Path) -> None:
    (tmp_path / "crashes").touch()
    command = start(restart=1)
    assert command.says("error: tritonserver has ended, with exit code 134")
    assert command.says("the server is started again in 0.5 s (1 of 1)")
    assert command.says("curl"), command.log()


def test_a_server_that_fails_is_replaced_until_it_fails_too_often(start: Start, tmp_path: Path) -> None:
    command = start(restart=2)
    assert command.says("curl")
    os.kill(command.servers()[-1], signal.SIGKILL)
    assert command.says("error: tritonserver has ended, with exit code 137")
    assert command.says("the server is started again in 0.5 s (1 of 2)")
    assert command.says("curl", times=2), command.log()
    states = [child.status() for child in psutil.Process(command.process.pid).children(recursive=True)]
    assert psutil.STATUS_ZOMBIE not in states
    (tmp_path / "broken").touch()
    assert command.says(
        "error: the server does not work any more and is stopped: lightllm answers with status 400: a stub"
    )
    (tmp_path / "broken").unlink()
    assert command.says("the server is started again in 1 s (2 of 2)")
    assert command.says("curl", times=3), command.log()
    assert "the server is stopped: lightllm answers with status 400" in (tmp_path / "closed").read_text()
    os.kill(command.servers()[-1], signal.SIGKILL)
    assert command.process.wait(60) == 1
    assert "error: the server has failed; restart is 2, and this was failure 3 in a row" in command.log()
    assert command.has_left_nothing()


def test_a_restart_that_fails_counts(start: Start, tmp_path: Path) -> None:
    command = start(restart=1)
    assert command.says("curl")
    (tmp_path / "fails").touch()
    os.kill(command.servers()[-1], signal.SIGKILL)
    assert command.process.wait(60) == 1
    assert len(command.servers()) == 2


# Stopped


def test_requests_that_run_have_their_time(start: Start, tmp_path: Path) -> None:
    command = start()
    assert command.says("curl")
    (tmp_path / "busy").touch()
    command.process.terminate()
    assert poll((tmp_path / "closed").exists)
    time.sleep(1.0)
    assert identity(command.servers()[0]), "it has not been stopped"
    (tmp_path / "busy").unlink()
    assert command.process.wait(60) == 0


def test_requests_that_run_at_the_limit_are_cut(start: Start, tmp_path: Path) -> None:
    command = start(shutdown_timeout_s=0.7)
    assert command.says("curl")
    (tmp_path / "busy").touch()
    command.process.terminate()
    assert command.process.wait(60) == 3
    assert "ending requests before they are complete: " in command.log()
    assert (tmp_path / "closed").read_text().splitlines()[-1] == "the server is shutting down, False"


def test_a_server_that_has_answered_everything_is_not_waited_for(start: Start, tmp_path: Path) -> None:
    command = start()
    assert command.says("curl")
    (tmp_path / "stubborn").touch()
    command.process.terminate()
    assert command.process.wait(60) == 0
    assert "killed" not in command.log()
    assert "exit code" not in command.log()
    assert command.has_left_nothing()
    assert not (tmp_path / "orphaned").exists()


def test_a_second_signal_stops_at_once(start: Start, tmp_path: Path) -> None:
    command = start(shutdown_timeout_s=300)
    assert command.says("curl")
    (tmp_path / "busy").touch()
    command.process.terminate()
    assert poll((tmp_path / "closed").exists)
    command.process.send_signal(signal.SIGINT)
    assert command.process.wait(60) == 3
    assert command.has_left_nothing()


def test_a_second_signal_cuts_nothing_if_nothing_runs(start: Start, tmp_path: Path) -> None:
    command = start(shutdown_timeout_s=300)
    assert command.says("curl")
    command.process.terminate()
    assert poll((tmp_path / "closed").exists)
    command.process.send_signal(signal.SIGINT)
    assert command.process.wait(60) == 0
    assert "before they are complete" not in command.log()
    assert command.has_left_nothing()


def test_a_server_that_loads_is_stopped(start: Start, tmp_path: Path) -> None:
    """Also one that does not obey."""
    (tmp_path / "loads").touch()
    shared = Path(f"/dev/shm/triton_python_backend_shm_region_{uuid.uuid4()}")
    (tmp_path / "shared").write_text(str(shared))
    command = start()
    assert poll(shared.exists)
    time.sleep(0.2)  # it is mapped
    command.process.terminate()
    assert command.process.wait(60) == 0
    assert not shared.exists()
    assert "tritonserver was loading and did not end within 0.5 s; it was killed" in command.log()
    assert not identity(command.servers()[0])


# Killed


@pytest.mark.parametrize("loads", [False, True])
def test_a_killed_command_leaves_nothing_behind(start: Start, tmp_path: Path, loads: bool) -> None:
    if loads:
        (tmp_path / "loads").touch()
    command = start()
    assert poll((tmp_path / "starts").exists) if loads else command.says("curl")
    command.process.kill()
    assert poll(command.has_no_server)
    assert poll(lambda: not list(command.base.iterdir()))
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", int(command.settings["http_port"]))) != 0
    if not loads:
        assert "the server is stopped: the launch command is dead, False" in (tmp_path / "closed").read_text()
