# SPDX-License-Identifier: Apache-2.0
"""Service: runs servers, one after the other, until it is asked to stop or a server fails too often. No torch."""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

from rich.table import Table

from lightllm_backend.config import PROBE_KEY_VARIABLE
from lightllm_backend.generation.engine_client import EngineClient
from lightllm_backend.launch import health
from lightllm_backend.launch.closing import EngineCloser, Progress, wait_delivered
from lightllm_backend.launch.fronts import Fronts
from lightllm_backend.launch.health import Health, http_call
from lightllm_backend.launch.http_sockets import enlarge_message_buffers, limit_unread_seconds
from lightllm_backend.launch.server import Launch, Server
from lightllm_backend.messages.engine_messages import EngineInfo
from lightllm_backend.messages.run_directory import engine_address
from lightllm_backend.request import RequestError

# Exit codes; 2 is a usage error.
STOPPED, FAILED, CUT = 0, 1, 3
CRASHED = 128  # a server's exit code is above it if a signal has ended it

LOOK_SECONDS = 0.1  # from one look at the server, and at signals, to the next
PROGRESS_SECONDS = 10.0
# The parts of a stop beyond `shutdown_timeout_s`, one after the other. The guard needs half a second more: 5 s in all.
TELL_SECONDS = 2.0  # for the clients of a server that is stopped to hear it
FRONT_SECONDS = 1.0  # for the front to pass on what it has heard
# For a server to end in order. What has been answered leaves its connections in far less; to unload its models takes it
# seconds more and serves nobody: they keep nothing, and the guard removes what a killed server leaves.
STOP_SECONDS = 1.5
FIRST_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 0.5, 30.0  # before a restart; the pause doubles with each failure in a row
STEADY_SECONDS = 300.0  # a server that has served for so long has not failed in a row
FEW_MESSAGES = 10_000  # for a thread of the HTTP frontend; an answer takes two, and one per chunk if it streams

Say = Callable[[str | Table], None]


class Service:
    """The launch command's work. SIGTERM or SIGINT stops it; a second one stops it at once."""

    def __init__(self, launch: Launch, say: Say) -> None:
        self._launch = launch
        self._say = say
        self._address = launch.address(launch.config.http_port)
        self._fronts: Fronts | None = None
        self._signals = 0
        self._was_killed = False
        self._code = STOPPED
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def run(self) -> int:
        """Serve until the end; return the exit code."""
        try:
            if self._launch.config.openai_port is not None:
                self._fronts = Fronts(self._launch.config, self._launch.front_environment, self._say)
            return self._run_servers()
        except OSError as error:
            self._say(f"error: the front cannot be started: {error}")
            return FAILED
        finally:
            self._stop_fronts(0.0)

    def _run_servers(self) -> int:
        """Run one server after the other; return the exit code."""
        failures, restart, has_served = 0, self._launch.config.restart, False
        while True:
            seconds, code = self._run_server()
            if self._signals:
                return self._code
            has_served = has_served or seconds > 0.0
            if not has_served and code <= CRASHED:  # it gave up by itself, and would do so again
                self._say("error: tritonserver ended before it was ready; the lines above say why")
                return FAILED
            failures = 1 if seconds >= STEADY_SECONDS else failures + 1
            if failures > restart:
                self._say(
                    f"error: the server has failed; restart is {restart}, and this was failure {failures} in a row"
                )
                return FAILED
            pause = min(FIRST_PAUSE_SECONDS * 2 ** (failures - 1), MAX_PAUSE_SECONDS)
            self._say(f"the server is started again in {pause:g} s ({failures} of {restart})")
            end = time.monotonic() + pause
            while time.monotonic() < end and not self._signals:
                time.sleep(LOOK_SECONDS)
            if self._signals:
                return STOPPED

    def _run_server(self) -> tuple[float, int]:
        """Run one server until nothing of it is left; return how long it was ready, and its exit code."""
        self._say(f"starting tritonserver with {self._launch.model_dir}")
        server = Server(self._launch)
        start_seconds = self._wait_ready(server)
        ready_at = time.monotonic()
        if start_seconds is not None:
            self._set_socket_options(server)
            engine = EngineClient(engine_address(server.directory))
            try:
                self._watch(server, engine, start_seconds)
            finally:
                engine.close()
        elif self._signals and not server.stop(STOP_SECONDS):
            self._say(f"tritonserver was loading and did not end within {STOP_SECONDS:g} s; it was killed")
        seconds = 0.0 if start_seconds is None else time.monotonic() - ready_at
        code = server.end()
        if not self._signals:
            self._say(f"error: tritonserver has ended, with exit code {code}")
        elif code and not self._was_killed:
            self._say(f"tritonserver has ended, with exit code {code}" + "; no request ran" * (self._code == STOPPED))
        return seconds, code

    def _wait_ready(self, server: Server) -> float | None:
        """Return the seconds until the server is ready, or None if it ended, or a signal came, first."""
        started = told = time.monotonic()
        while not server.ended_within(2 * LOOK_SECONDS) and not self._signals:
            server.keep_guard()
            now = time.monotonic()
            with contextlib.suppress(OSError):
                if http_call(self._address, "GET", "/v2/health/ready", None, health.PROBE_SECONDS)[0] == http.client.OK:
                    return now - started
            if now - told >= PROGRESS_SECONDS:
                told = now
                self._say(f"loading … {now - started:.0f} s")
        return None

    def _set_socket_options(self, server: Server) -> None:
        config = self._launch.config
        try:
            limit_unread_seconds(server.pid, config.http_port, config.unread_timeout_s)
            messages = enlarge_message_buffers(server.pid)
        except OSError as error:
            self._say(
                "warning: HTTP clients that read nothing are never disconnected, and answers over HTTP may be lost when"
                f" many requests end at once (docs/reliability.md#floods-over-http): {error}"
            )
            return
        if messages is not None and messages < FEW_MESSAGES:
            self._say(
                f"warning: answers over HTTP may be lost when more than {messages // 2} requests end at once; a larger"
                " net.core.wmem_max helps (docs/reliability.md#floods-over-http)"
            )

    def _watch(self, server: Server, engine: EngineClient, start_seconds: float) -> None:
        """Watch a server that is ready, until it has ended, or has been ended."""
        try:
            self._say(summary(self._launch, engine.wait_ready(health.PROBE_SECONDS)))
            self._say(f"ready after {start_seconds:.1f} s; ask it something:\n{first_call(self._address)}")
        except RequestError as error:
            self._say(f"warning: the server is ready, its engine is not: {error}")
        key = self._launch.environment[PROBE_KEY_VARIABLE]
        closer = EngineCloser(server.directory)
        # A lost host may stay away for as long as it likes: another server would wait for it no less.
        excused_seconds = start_seconds if self._launch.config.nnodes == 1 else math.inf
        prober = _Prober(Health(self._address, server.directory, engine, excused_seconds, key))
        try:
            while not server.ended_within(LOOK_SECONDS):
                server.keep_guard()
                if self._signals:
                    self._code = self._drain(server, closer)
                    return
                if prober.failure:
                    self._say(f"error: the server does not work any more and is stopped: {prober.failure}")
                    closer.close_engine(f"the server is stopped: {prober.failure}")
                    wait_delivered(server.directory, TELL_SECONDS)
                    server.stop(STOP_SECONDS)
                    return
        finally:
            prober.stop()
            closer.disconnect()

    def _drain(self, server: Server, closer: EngineCloser) -> int:
        """Refuse new requests, let those that run end within the limit, and stop the server; return the exit code."""
        limit = self._launch.config.shutdown_timeout_s
        reason = "the server is shutting down"
        self._say(f"shutting down: requests that run may take {limit:g} s; a second signal stops the server at once")
        end = time.monotonic() + limit
        progress = Progress(server.directory)
        is_drained = False
        while not is_drained and self._signals == 1 and not server.ended_within(0.0):
            if time.monotonic() >= end:
                break
            closer.close_engine(reason, drain=True)
            progress.look()
            is_drained = progress.engine_rests
        if not is_drained and self._signals > 1:  # perhaps nothing runs, and there was no time to find out
            progress.look()
            is_drained = progress.engine_rests and progress.num_open == 0
        if not is_drained:
            self._say(f"ending requests before they are complete: {progress.num_open}")
            closer.close_engine(reason)
        has_answered = self._signals == 1 and wait_delivered(server.directory, TELL_SECONDS)
        self._stop_fronts(FRONT_SECONDS if self._signals == 1 else 0.0)
        seconds = STOP_SECONDS if self._signals == 1 else 0.0
        self._was_killed = not server.stop(seconds)
        if self._was_killed and seconds and not has_answered:
            self._say(f"not every answer was sent within {TELL_SECONDS:g} s; tritonserver was killed")
        return STOPPED if is_drained else CUT

    def _stop_fronts(self, seconds: float) -> None:
        """Stop the front, which passes on within `seconds` what the server has answered."""
        fronts, self._fronts = self._fronts, None
        if fronts:
            fronts.stop(seconds)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._signals += 1


class _Prober:
    """Runs the health checks in a thread, since each takes seconds. `failure`: what they have found."""

    def __init__(self, checks: Health) -> None:
        self.failure: str | None = None
        self._checks = checks
        self._stopping = threading.Event()
        threading.Thread(target=self._probe, name="health", daemon=True).start()

    def stop(self) -> None:
        """Begin no further check."""
        self._stopping.set()

    def _probe(self) -> None:
        while not self.failure and not self._stopping.wait(health.PROBE_SECONDS):
            self.failure = self._checks.check()


def summary(launch: Launch, info: EngineInfo) -> Table:
    """Make the table of the settings in effect and the sizes that the engine determined."""
    config = launch.config
    weights = f" with {config.weight_dtype} weights" if config.weight_dtype != "auto" else ""
    rows = {
        "model": info.model + (" (random weights)" if config.load_format == "dummy" else ""),
        "computed on": f"{info.device}, {info.dtype}{weights}, {config.tp} rank{'s' * (config.tp > 1)}"
        + f" on {config.nnodes} hosts" * (config.nnodes > 1),
        "KV pool": f"{info.pool_tokens:,} tokens, {info.memory['KV pool'] / 2**30:.2f} GiB"
        + " on each rank" * (config.tp > 1),
        "a request": str(info.lengths),
        "at once": f"at most {config.running_max_req_size:,} requests, {config.max_queue_size:,} more in the queue",
        "HTTP": f"http://{launch.address(config.http_port)}/v2/models/lightllm",
        "gRPC": launch.address(config.grpc_port),
        **({} if config.openai_port is None else {"front": f"http://{launch.address(config.openai_port)}/v1"}),
        "metrics": f"http://{launch.address(config.metrics_port)}/metrics",
    }
    table = Table(show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def first_call(address: str) -> str:
    body = json.dumps({"text_input": "The capital of Japan is", "max_tokens": 16})
    return f"curl {address}/v2/models/lightllm/generate -d '{body}'"
