# SPDX-License-Identifier: Apache-2.0
"""Decides whether a server works, for the launch command's watch and the `health` model. Imports no torch.

The decision has two kinds of evidence. Each process publishes its vitals (messages/vitals.py); they reveal a dead,
stopped or stuck process with or without load. Probes, real requests for one token, pass through every step. On a busy
server a probe may be late, which proves nothing as long as every step takes requests and the engine computes.
"""

from __future__ import annotations

import http.client
import json
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil

from lightllm_backend.generation.engine_client import EngineClient
from lightllm_backend.messages.vitals import Reading, read_vitals

PROBED_MODELS = ("lightllm", "lightllm_unary")  # one request to each of them passes through every step
PROBE_SECONDS = 10.0  # from one check to the next; also the timeout of a probe
# Failed checks among the last few, not in a row: with one of two detokenizers gone, every other request fails.
MAX_FAILED_CHECKS, REMEMBERED_CHECKS = 3, 5
# A live process beats every second; waiting for a core or for the GIL can delay a beat.
LATE_BEAT_SECONDS = 10.0
# The roles of the processes on a request's way; several processes may share a role.
STEPS = ("tokenizer", "generation", "detokenizer", "lightllm_unary")
ENGINE = "worker-0"  # the rank that runs the Router; further ranks compute with it


@dataclass(frozen=True)
class Failure:
    """The reason why the server does not work, and the workers to replace; without workers, stop the server."""

    reason: str
    workers: tuple[int, ...] = ()


def standstills(readings: Sequence[Reading], now: float) -> dict[int, str]:
    """Find the dead, stopped and stuck processes: pid to reason in words."""
    reasons = {}
    for reading in readings:
        silent = now - reading.beat
        busy = now - reading.busy_since if reading.busy_since else 0.0
        if not reading.alive:
            reasons[reading.pid] = f"{reading.name} is dead"
        elif silent > LATE_BEAT_SECONDS:
            reasons[reading.pid] = f"{reading.name} has stood still for {silent:.0f} s"
        elif busy > reading.patience:
            reasons[reading.pid] = f"{reading.name} has been stuck for {busy:.0f} s"
    return reasons


def why_unready(directory: Path) -> str | None:
    """Return why the server of this run directory should get no requests now, or None if it should."""
    readings = read_vitals(directory)
    roles = {reading.role for reading in readings}
    reasons = [f"{role} is not loaded" for role in (*STEPS, ENGINE) if role not in roles]
    reasons += standstills(readings, time.monotonic()).values()
    return "; ".join(reasons) or None


class Health:
    """The launch command's watch. Each `check` takes up to PROBE_SECONDS.

    A Failure names the stuck workers: the caller kills them, and the generation step starts others. A restarting engine
    has twice the time of the first start before its failed probes count.
    """

    def __init__(
        self,
        address: str,
        server_pid: int,
        directory: Path,
        engine: EngineClient,
        start_seconds: float,
        probe_key: str = "",
    ) -> None:
        self._address = address
        self._server_pid = server_pid
        self._directory = directory
        self._engine = engine
        self._probe_key = probe_key
        self._failed: deque[bool] = deque(maxlen=REMEMBERED_CHECKS)
        self._restart_seconds = max(2 * start_seconds, PROBE_SECONDS * MAX_FAILED_CHECKS)
        self._down_since: float | None = None

    def check(self) -> Failure | None:
        """Probe each entry and read every process's vitals; return a Failure once enough checks have failed."""
        before = read_vitals(self._directory)
        with ThreadPoolExecutor(len(PROBED_MODELS)) as pool:
            probes = list(pool.map(self._probe, PROBED_MODELS))
        after, now = read_vitals(self._directory), time.monotonic()
        still = standstills(after, now)
        stubs = {reading.pid for reading in after if not reading.role.startswith("worker-")}
        dead = [still[reading.pid] for reading in after if not reading.alive and reading.pid in stubs]
        stopped = [f"tritonserver (process {self._server_pid}) is stopped"] if self._server_is_stopped() else []
        if dead:  # a step has no supervisor
            return Failure("; ".join(stopped + dead))
        restarting = self._is_restarting()
        # The generation step replaces dead workers.
        workers = tuple(r.pid for r in after if r.pid in still and r.pid not in stubs and r.alive)
        reasons = stopped + [reason for pid, reason in still.items() if pid in stubs or pid in workers]
        moves = _moves(before, after, now)
        reasons += [probe.reason for probe in probes if probe.reason and not restarting and not (probe.late and moves)]
        self._failed.append(bool(reasons))
        if self._failed.count(True) < MAX_FAILED_CHECKS:
            return None
        self._failed.clear()
        return Failure("; ".join(reasons), () if stubs & still.keys() else workers)

    def _probe(self, model: str) -> _Probe:
        body: dict[str, object] = {"text_input": "Hello", "max_tokens": 1, "timeout": int(PROBE_SECONDS * 1e6)}
        if self._probe_key:
            body["probe_key"] = self._probe_key
        try:
            status, answer = http_call(
                self._address, "POST", f"/v2/models/{model}/generate", json.dumps(body), PROBE_SECONDS
            )
        except TimeoutError:
            return _Probe(f"{model} does not answer within {PROBE_SECONDS:g} s", late=True)
        except OSError as error:
            return _Probe(f"{model} does not answer: {error or type(error).__name__}")
        if status == http.client.OK:
            return _Probe(None)
        # The probe's own deadline has passed, or queue_timeout_s.
        late = "CANCELLED" in answer or "in the queue" in answer
        return _Probe(f"{model} answers with status {status}: {answer}", late)

    def _server_is_stopped(self) -> bool:
        try:
            return bool(psutil.Process(self._server_pid).status() == psutil.STATUS_STOPPED)
        except psutil.NoSuchProcess:
            return False

    def _is_restarting(self) -> bool:
        if self._engine.up:
            self._down_since = None
            return False
        self._down_since = self._down_since or time.monotonic()
        return time.monotonic() - self._down_since < self._restart_seconds


@dataclass(frozen=True)
class _Probe:
    """The result of a probe."""

    reason: str | None  # why it failed; None: it did not
    late: bool = False  # true: no answer yet, rather than a wrong one


def _moves(before: Sequence[Reading], after: Sequence[Reading], now: float) -> bool:
    """Whether, between two readings, every step took a request and the engine finished, or is computing, a step."""
    had, has = _taken(before), _taken(after)
    if any(has.get(step, 0) <= had.get(step, 0) for step in STEPS):
        return False
    engine = next((reading for reading in after if reading.role == ENGINE), None)
    if engine is None:
        return False
    computes = engine.busy_since > 0 and now - engine.busy_since <= engine.patience
    return has[ENGINE] > had.get(ENGINE, 0) or computes


def _taken(readings: Sequence[Reading]) -> Mapping[str, int]:
    """Sum the `taken` counters of the processes of each role."""
    taken: dict[str, int] = {}
    for reading in readings:
        taken[reading.role] = taken.get(reading.role, 0) + reading.taken
    return taken


def http_call(address: str, method: str, path: str, body: str | None, timeout: float) -> tuple[int, str]:
    """Call a port of this machine, past any proxy of the environment; return the status and the text of the answer.

    Raise TimeoutError without an answer within `timeout` seconds, another OSError without a connection.
    """
    connection = http.client.HTTPConnection(address, timeout=timeout)
    try:
        connection.request(method, path, body)
        response = connection.getresponse()
        return response.status, response.read().decode(errors="replace")
    except http.client.HTTPException as error:
        raise ConnectionError(repr(error)) from None
    finally:
        connection.close()
