# SPDX-License-Identifier: Apache-2.0
"""What is measured: a server that runs, one that is started for the measurement, or the engine without a server."""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np

from lightllm_backend.config import ENVIRONMENT_PREFIX, EngineConfig
from lightllm_backend.generation.engine_client import EngineClient
from lightllm_backend.request import Request, RequestError, SamplingParams, TokenChunk
from lightllm_backend.router.statistics import EngineStats
from perf.engine_under_test import engine_client
from perf.serving.calls import Target
from perf.serving.load import START_SECONDS, Planned, run_load
from perf.serving.measure import ClientShare, RequestFailed, Trace, check, name_of
from perf.serving.timeline import FACTS, Moment, read_metrics

POLL_SECONDS = 0.2
START_LIMIT_SECONDS = 600.0
STOP_LIMIT_SECONDS = 90.0

Seen = tuple[float, list[Trace], list[ClientShare]]  # when the run started, and what its clients saw


class SystemFailed(Exception):
    """What is to be measured could not be started; the message is its own."""


class System(Protocol):
    def moment(self) -> Moment: ...
    def run(self, plan: Sequence[Planned], concurrency: int | None, on_progress: Callable[[int], None]) -> Seen: ...


class ServerSystem:
    """Any server that runs. ports: of one that was launched, by the names of their settings."""

    def __init__(
        self, target: Target, metrics_address: str, processes: int, ports: Mapping[str, int] | None = None
    ) -> None:
        self.target = target
        self.ports = ports or {}
        self._metrics_address = metrics_address
        self._processes = processes

    def moment(self) -> Moment:
        return read_metrics(self._metrics_address)

    def run(self, plan: Sequence[Planned], concurrency: int | None, on_progress: Callable[[int], None]) -> Seen:
        return run_load(self.target, plan, self._processes, concurrency, on_progress)


@contextlib.contextmanager
def launched_server(settings: Mapping[str, str], target: Target, processes: int) -> Iterator[ServerSystem]:
    """A server by the launch command, on free ports, which is stopped at the end."""
    names = ["http_port", "grpc_port", "metrics_port", *(["openai_port"] if target.protocol == "openai" else [])]
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    ready = {ports["http_port"]: "/v2/health/ready", ports["metrics_port"]: "/metrics"}
    if target.protocol == "openai":
        ready[ports["openai_port"]] = "/health"
    options = [f"--{name}={value}" for name, value in {**settings, **ports}.items()]
    with tempfile.NamedTemporaryFile(prefix="lightllm-serve-", suffix=".log") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "lightllm_backend.serve", *options],
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=Path(__file__).resolve().parents[2],
        )
        try:
            wait_ready(process, ready, Path(log.name))
            address = f"127.0.0.1:{ports[f'{target.protocol}_port']}"
            metrics_address = f"127.0.0.1:{ports['metrics_port']}"
            yield ServerSystem(replace(target, address=address), metrics_address, processes, ports)
        except RequestFailed as failure:
            raise RequestFailed(f"{failure}\nthe server's last lines:\n{_last_lines(Path(log.name))}") from None
        finally:
            process.terminate()
            try:
                process.wait(STOP_LIMIT_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_ready(process: subprocess.Popen[bytes], paths: Mapping[int, str], log: Path) -> None:
    """Wait until each port answers at its path. Raise SystemFailed if one does not, or if the server logs an error."""
    end = time.monotonic() + START_LIMIT_SECONDS
    while not all(answers(port, path) for port, path in paths.items()):
        if process.poll() is not None:
            raise SystemFailed(f"the server ended with exit code {process.returncode}:\n{_last_lines(log)}")
        if " error: " in log.read_text(errors="replace"):  # the launch command's own; it would try again for long
            raise SystemFailed(f"the server does not start:\n{_last_lines(log)}")
        if time.monotonic() > end:
            raise SystemFailed(f"the server is not ready after {START_LIMIT_SECONDS:g} s:\n{_last_lines(log)}")
        time.sleep(POLL_SECONDS)


def answers(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _last_lines(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


class EngineSystem:
    """The engine without a server: requests go from this process straight to the worker."""

    def __init__(self, client: EngineClient, ignore_eos: bool, latest: Callable[[], EngineStats]) -> None:
        self._client = client
        self._ignore_eos = ignore_eos
        self._latest = latest

    def moment(self) -> Moment:
        stats = self._latest()
        return Moment(time.monotonic(), **{name: getattr(stats, name) for name in FACTS})

    def run(self, plan: Sequence[Planned], concurrency: int | None, on_progress: Callable[[int], None]) -> Seen:
        requests = [self._request(planned) for planned in plan]
        slots = threading.Semaphore(concurrency or len(plan))
        answers = [_Answer(planned.index, slots, on_progress) for planned in plan]
        lags = []
        computing, started = time.process_time(), time.monotonic() + START_SECONDS
        for planned, request, answer in zip(plan, requests, answers, strict=True):
            time.sleep(max(0.0, started + planned.due - time.monotonic()))
            slots.acquire()
            lags.append(time.monotonic() - started - planned.due)
            answer.trace.sent = time.monotonic()
            try:
                self._client.submit(request, answer.on_chunk)
            except RequestError as error:
                raise RequestFailed(f"{name_of(planned.index, planned.item)}: {error}") from None
        for planned, answer in zip(plan, answers, strict=True):
            answer.ended.wait()
            if answer.error is not None:
                raise RequestFailed(f"{name_of(planned.index, planned.item)}: {answer.error}")
            check(answer.trace, planned.item, True, self._ignore_eos)
        cpu_share = (time.process_time() - computing) / (time.monotonic() - started)
        send_lag = float(np.percentile(lags, 99)) if concurrency is None and plan[-1].due > 0 else 0.0
        return started, [answer.trace for answer in answers], [ClientShare(cpu_share, 0.0, send_lag)]

    def _request(self, planned: Planned) -> Request:
        item = planned.item
        assert not isinstance(item.prompt, str), "the engine takes token ids"
        sampling = SamplingParams(max_tokens=item.length.output, ignore_eos=self._ignore_eos)
        return Request(self._client.new_uid(), item.prompt, sampling)


class _Answer:
    """One request's answer while it comes, on the client's reader thread."""

    def __init__(self, index: int, slots: threading.Semaphore, on_progress: Callable[[int], None]) -> None:
        self.trace = Trace(index)
        self.error: RequestError | None = None
        self.ended = threading.Event()
        self._slots = slots
        self._on_progress = on_progress

    def on_chunk(self, chunk: TokenChunk) -> None:
        self.trace.arrivals.append(time.monotonic())
        self.trace.tokens.append(len(chunk.token_ids))
        if chunk.finish_reason is not None:
            self.trace.prompt_tokens, self.trace.finish_reason = chunk.num_prompt_tokens, chunk.finish_reason.value
            self.error = chunk.error
            self._on_progress(1)
            self._slots.release()
            self.ended.set()


@contextlib.contextmanager
def engine_alone(settings: Mapping[str, str], ignore_eos: bool) -> Iterator[EngineSystem]:
    variables = {ENVIRONMENT_PREFIX + name.upper(): value for name, value in settings.items()}
    config = EngineConfig.build({}, {**os.environ, ENVIRONMENT_PREFIX + "WORKER_PYTHON": sys.executable, **variables})
    latest = EngineStats()

    def on_stats(stats: EngineStats) -> None:
        nonlocal latest
        latest = stats

    with engine_client(config, on_stats) as client:
        yield EngineSystem(client, ignore_eos, lambda: latest)
