# SPDX-License-Identifier: Apache-2.0
"""Decides whether a server works, for the launch command's watch and the `health` model. Imports no torch.

The decision has two kinds of evidence. Each process publishes its vitals (messages/vitals.py); they reveal a dead,
stopped or stuck process with or without load, which the guard ends (guard.py). Probes, real requests for one token,
pass through every step. On a busy server a probe may be late, which proves nothing as long as every step takes requests
and the engine computes; a wrong answer always counts.
"""

from __future__ import annotations

import http.client
import json
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from lightllm_backend.generation.engine_client import EngineClient
from lightllm_backend.messages.vitals import ENGINE, STEPS, Reading, read_vitals, standstills

PROBED_MODELS = ("lightllm", "lightllm_unary")  # one request to each of them passes through every step
PROBE_SECONDS = 10.0  # from one check to the next; also the timeout of a probe
# Failed checks among the last few, not in a row: with one of two detokenizers gone, every other request fails.
MAX_FAILED_CHECKS, REMEMBERED_CHECKS = 3, 5
# Triton server's answer for a model that was loaded once and is not now. One whose process is dead stays loaded.
_UNLOADED = "has no available versions"


def why_unready(directory: Path) -> str | None:
    """Return why the server of this run directory should get no requests now, or None if it should."""
    readings = read_vitals(directory)
    roles = {reading.role for reading in readings}
    reasons = [f"{role} is not loaded" for role in (*STEPS, ENGINE) if role not in roles]
    if any(reading.closing for reading in readings):
        reasons.append("the server is being stopped and takes no more requests")
    reasons += standstills(readings, time.monotonic()).values()
    return "; ".join(reasons) or None


class Health:
    """The launch command's watch: finds what the guard cannot see. Each `check` takes up to PROBE_SECONDS.

    A restarting engine has twice the time of the first start before its failed probes count. Those of a model that
    somebody has unloaded do not count.
    """

    def __init__(
        self,
        address: str,
        directory: Path,
        engine: EngineClient,
        start_seconds: float,
        probe_key: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._address = address
        self._directory = directory
        self._engine = engine
        self._probe_key = probe_key
        self._clock = clock
        self._failed: deque[bool] = deque(maxlen=REMEMBERED_CHECKS)
        self._restart_seconds = max(2 * start_seconds, PROBE_SECONDS * MAX_FAILED_CHECKS)
        self._down_since: float | None = None

    def check(self) -> str | None:
        """Probe each entry; return the reason to stop the server once enough checks have failed."""
        before = read_vitals(self._directory)
        with ThreadPoolExecutor(len(PROBED_MODELS)) as pool:
            probes = list(pool.map(self._probe, PROBED_MODELS))
        after = read_vitals(self._directory)
        is_restarting = self._is_restarting(after)
        is_excused = {
            _Result.RIGHT: True,
            _Result.UNLOADED: True,
            _Result.UNAVAILABLE: is_restarting,
            _Result.LATE: is_restarting or _moves(before, after, self._clock()),
            _Result.WRONG: False,
        }
        reasons = [probe.reason for probe in probes if not is_excused[probe.result]]
        self._failed.append(bool(reasons))
        if self._failed.count(True) < MAX_FAILED_CHECKS:
            return None
        return "; ".join(reasons)

    def _probe(self, model: str) -> _Probe:
        body: dict[str, object] = {"text_input": "Hello", "max_tokens": 1, "timeout": int(PROBE_SECONDS * 1e6)}
        if self._probe_key:
            body["probe_key"] = self._probe_key
        begun = self._clock()
        try:
            status, answer = http_call(
                self._address, "POST", f"/v2/models/{model}/generate", json.dumps(body), PROBE_SECONDS
            )
        except TimeoutError:
            return _Probe(_Result.LATE, f"{model} does not answer within {PROBE_SECONDS:g} s")
        except OSError as error:
            return _Probe(_Result.WRONG, f"{model} does not answer: {error or type(error).__name__}")
        if status == http.client.OK:
            return _Probe(_Result.RIGHT)
        # The probe's own deadline has passed, or queue_timeout_s; an error that comes at once says something else.
        waited = self._clock() - begun >= PROBE_SECONDS / 2 and "CANCELLED" in answer
        if _UNLOADED in answer:
            result = _Result.UNLOADED
        elif "the engine is not up" in answer or "the engine stopped" in answer:
            result = _Result.UNAVAILABLE
        else:
            result = _Result.LATE if waited or "in the queue" in answer else _Result.WRONG
        return _Probe(result, f"{model} answers with status {status}: {answer}")

    def _is_restarting(self, readings: Sequence[Reading]) -> bool:
        """Whether there is no engine and need not be one yet: it has time, or the model that keeps it is unloaded."""
        is_unloaded = not any(reading.role == "generation" for reading in readings)  # a dead one leaves its vitals
        if self._engine.up or is_unloaded:
            self._down_since = None
            return is_unloaded
        self._down_since = self._down_since or self._clock()
        return self._clock() - self._down_since < self._restart_seconds


class _Result(Enum):
    RIGHT = "right"
    LATE = "late"  # no answer within the probe's time, or within queue_timeout_s
    UNAVAILABLE = "unavailable"  # the engine is not up
    UNLOADED = "unloaded"  # the model, or one that it consists of
    WRONG = "wrong"


@dataclass(frozen=True)
class _Probe:
    """The result of a probe, and its reason in words unless it is right."""

    result: _Result
    reason: str = ""


def _moves(before: Sequence[Reading], after: Sequence[Reading], now: float) -> bool:
    """Whether, between two readings, every step took a request and the engine finished, or is computing, a step.

    The detokenizer has nothing to take as long as the engine finishes no step.
    """
    had, has = _taken(before), _taken(after)
    engine = next((reading for reading in after if reading.role == ENGINE), None)
    if engine is None:
        return False
    has_finished = has[ENGINE] > had.get(ENGINE, 0)
    if any(has.get(step, 0) <= had.get(step, 0) for step in STEPS if has_finished or step != "detokenizer"):
        return False
    return has_finished or 0 < engine.busy_since >= now - engine.patience


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
