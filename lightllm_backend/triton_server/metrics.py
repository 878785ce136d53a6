# SPDX-License-Identifier: Apache-2.0
"""Metrics: the values on Triton server's metrics endpoint. No torch.

Each call of the server's metrics interface is a round trip to the server's process, so no thread that handles requests
makes one: one thread carries over the collected observations, a few times a second.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from lightllm_backend.request import RequestError
from lightllm_backend.router.statistics import EngineStats

FLUSH_SECONDS = 0.1  # far below the interval at which anybody scrapes metrics
WORKS_SECONDS = 1.0  # from one look at the workers to the next
# Limit on the values of one histogram in a flush; of more, every second or third … is taken. With 10 flushes a second,
# up to 500 values a second are complete: all requests, and the tokens of a few dozen streams.
MAX_OBSERVATIONS = 50
# Pause after each call, which holds the GIL: the threads that send tokens get it in between.
PAUSE_SECONDS = 0.2e-3
SECONDS_BUCKETS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0]

GAUGES = {
    "queued_requests": "Requests that wait for admission",
    "running_requests": "Requests that are being computed",
    "kv_tokens_used": "Token slots of the KV pool that live sequences hold",
    "kv_tokens_cached": "Token slots that only the prefix cache holds",
    "kv_tokens_total": "Token slots of the KV pool",
    "engine_up": "1 if the engine takes requests",
}
COUNTERS = {
    "prompt_tokens_total": "Prompt tokens computed",
    "generated_tokens_total": "Tokens generated",
    "device_seconds_total": "Seconds that the device has computed",
    "preemptions_total": "Times a running request gave its token slots to older ones (admission past_future)",
    "engine_restarts_total": "Times the engine was started again after it failed",
}
HISTOGRAMS = {
    "queue_seconds": "From submission to admission",
    "time_to_first_token_seconds": "From submission to the first token",
    "inter_token_seconds": "Between tokens of one request (sampled above 500 a second)",
    "request_seconds": "From submission to the last token",
}
log = logging.getLogger(__name__)

STATUSES = ("stop", "length", "cancelled", "failed", "rejected")
STATUS_OF_REFUSAL = {
    "INVALID_ARG": "rejected", "NOT_FOUND": "rejected", "UNAVAILABLE": "rejected", "CANCELLED": "cancelled",
    "INTERNAL": "failed",
}  # fmt: skip


class Metrics:
    """All metrics of this process; `backend` is the module triton_python_backend_utils, or a stand-in in tests.

    with_engine: whether this process reports the engine's state; only generation does. Each process that submits
    requests counts its own, and the server adds them up, since they share names and labels. engine_works: whether no
    worker stands still.
    """

    def __init__(self, backend: Any, with_engine: bool, engine_works: Callable[[], bool] = lambda: True) -> None:
        self._lock = threading.Lock()
        self._ended: Counter[str] = Counter()
        self._observed: dict[str, list[float]] = {name: [] for name in HISTOGRAMS}
        self._engine: EngineStats | None = None
        self._engine_up = False
        self._engine_works = engine_works
        self._works = True
        self._looked_at = 0.0
        self._restarts = 0
        self._reported: Counter[str] = Counter()

        def metric(name: str, description: str, kind: Any, **options: Any) -> Any:
            family = backend.MetricFamily(name=f"lightllm_{name}", description=description, kind=kind)
            self._families.append(family)
            return family.Metric(**options)

        self._families: list[Any] = []  # a family must outlive its metrics
        family_kinds = backend.MetricFamily
        requests = backend.MetricFamily(
            name="lightllm_requests_total", description="Requests that have ended, by status", kind=family_kinds.COUNTER
        )
        self._families.append(requests)
        self._requests = {status: requests.Metric(labels={"status": status}) for status in STATUSES}
        self._histograms = {
            name: metric(name, text, family_kinds.HISTOGRAM, labels={}, buckets=SECONDS_BUCKETS)
            for name, text in HISTOGRAMS.items()
        }
        self._gauges: dict[str, Any] = {}
        self._counters: dict[str, Any] = {}
        if with_engine:
            self._gauges = {name: metric(name, text, family_kinds.GAUGE, labels={}) for name, text in GAUGES.items()}
            self._counters = {
                name: metric(name, text, family_kinds.COUNTER, labels={}) for name, text in COUNTERS.items()
            }
        self._closing = threading.Event()
        self._flusher = threading.Thread(target=self._flush_for_ever, name="metrics", daemon=True)
        self._flusher.start()

    # From streams

    def first_token(self, seconds: float, queue_seconds: float) -> None:
        """A request got its first token, so long after its submission."""
        with self._lock:
            self._observed["time_to_first_token_seconds"].append(seconds)
            self._observed["queue_seconds"].append(queue_seconds)

    def next_token(self, seconds: float) -> None:
        """A request got another token, so long after the one before it."""
        with self._lock:
            self._observed["inter_token_seconds"].append(seconds)

    def finished(self, status: str, seconds: float) -> None:
        """A request that was submitted has ended, so long after that. The Router's refusals have no duration."""
        with self._lock:
            self._ended[status] += 1
            if status != "rejected":
                self._observed["request_seconds"].append(seconds)

    def refused(self, error: Exception) -> None:
        """A request ended before it was submitted: with an error of its own or the server's, or its time was up."""
        code = error.code if isinstance(error, RequestError) else "INTERNAL"
        with self._lock:
            self._ended[STATUS_OF_REFUSAL[code]] += 1

    # From the engine

    def engine_stats(self, stats: EngineStats) -> None:
        """Take the engine's newest counters."""
        with self._lock:
            self._engine = stats

    def engine_up(self, up: bool) -> None:
        """The engine takes requests from now on, or no more."""
        with self._lock:
            self._engine_up = up

    def engine_restarted(self) -> None:
        """A new worker was started, which counts its totals from zero."""
        with self._lock:
            self._restarts += 1
            self._engine = None
            for name in COUNTERS.keys() - {"engine_restarts_total"}:
                self._reported[name] = 0

    def close(self) -> None:
        """Stop the thread."""
        self._closing.set()
        self._flusher.join()

    def _flush_for_ever(self) -> None:
        """Flush until the server is gone.

        A call that a dead server does not answer never returns and, since it holds the GIL, blocks the whole process.
        The guard ends the process then.
        """
        server = os.getppid()
        while not self._closing.wait(FLUSH_SECONDS) and os.getppid() == server:
            try:
                self._flush()
            except Exception:
                log.exception("metrics could not be carried over")

    def _flush(self) -> None:
        if self._gauges and time.monotonic() >= self._looked_at + WORKS_SECONDS:
            self._looked_at, self._works = time.monotonic(), self._engine_works()
        for call, value in self._calls():
            call(value)
            time.sleep(PAUSE_SECONDS)

    def _calls(self) -> Iterator[tuple[Callable[[float], None], float]]:
        """The calls that carry over what has changed."""
        with self._lock:
            ended, self._ended = self._ended, Counter()
            observed, self._observed = self._observed, {name: [] for name in HISTOGRAMS}
            now = dict(vars(self._engine)) if self._engine else {}
            now |= {"engine_up": float(self._engine_up and self._works), "engine_restarts_total": self._restarts}
            increments = {name: now[name] - self._reported[name] for name in self._counters if name in now}
            self._reported.update(increments)
        for status, count in ended.items():
            yield self._requests[status].increment, count
        for name, values in observed.items():
            for value in values[:: -(-len(values) // MAX_OBSERVATIONS) or 1]:
                yield self._histograms[name].observe, value
        for name, increment in increments.items():
            if increment:
                yield self._counters[name].increment, increment
        for name, gauge in self._gauges.items():
            if name in now and now[name] != self._reported[name]:
                yield gauge.set, now[name]
                self._reported[name] = now[name]
