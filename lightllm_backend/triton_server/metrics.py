# SPDX-License-Identifier: Apache-2.0
"""Metrics: the values on Triton server's metrics endpoint. No torch.

Each call of the server's metrics interface is a round trip to the server's process, so no thread that handles requests
makes one: one thread carries over the collected observations, a few times a second.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lightllm_backend.generation.token_times import EndedRequest
from lightllm_backend.messages.engine_messages import EngineInfo
from lightllm_backend.request import RequestError
from lightllm_backend.router.statistics import EngineStats
from lightllm_backend.triton_server.metric_table import METRICS, PREFIX
from lightllm_backend.version import VERSION

FLUSH_SECONDS = 0.1  # far below the interval at which anybody scrapes metrics
WORKS_SECONDS = 1.0  # from one look at the workers to the next
# Limit on the values of one histogram in a flush; of more, every second or third … is taken. With 10 flushes a second,
# up to 500 values a second are complete: all requests, and the tokens of a few dozen streams.
MAX_OBSERVATIONS = 50
# Pause after each call, which holds the GIL: the threads that send tokens get it in between.
PAUSE_SECONDS = 0.2e-3
SECONDS_BUCKETS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0]

HISTOGRAMS = tuple(name for name, metric in METRICS.items() if metric.kind == "HISTOGRAM")
# Whatever the worker counts begins at zero with each worker.
WORKER_TOTALS = {name for name, metric in METRICS.items() if metric.of_engine and metric.kind == "COUNTER"}
WORKER_TOTALS.remove("engine_restarts_total")
STATUS_OF_REFUSAL = {
    "INVALID_ARG": "rejected", "NOT_FOUND": "rejected", "UNAVAILABLE": "rejected", "CANCELLED": "cancelled",
    "INTERNAL": "failed",
}  # fmt: skip

log = logging.getLogger(__name__)

Sample = tuple[str, tuple[str, ...]]  # a metric's name and the values of its labels


def info_labels(info: EngineInfo, model: str) -> dict[str, str]:
    """Return the labels of the metric `info`. model: the name by which clients know the model."""
    return {
        "model": model,
        "device": info.device,
        "dtype": info.dtype,
        "weight_dtype": info.weight_dtype,
        "kv_dtype": info.kv_dtype,
        "tp": str(info.tp),
        "slots": str(info.pool_tokens),
        "max_req_total_len": str(info.lengths.max_total),
        "version": VERSION,
    }


class Metrics:
    """All metrics of this process; `backend` is the module triton_python_backend_utils, or a stand-in in tests.

    with_engine: whether this process reports the engine's state; only generation does. Each process that submits
    requests counts its own, and the server adds them up, since they share names and labels. engine_works: whether no
    worker stands still.
    """

    def __init__(self, backend: Any, with_engine: bool, engine_works: Callable[[], bool] = lambda: True) -> None:
        self._lock = threading.Lock()  # guards what requests and the engine tell, and what of it is reported
        self._counted: Counter[Sample] = Counter()
        self._observed: dict[str, list[float]] = {name: [] for name in HISTOGRAMS}
        self._engine: EngineStats | None = None
        self._labels: Mapping[str, str] | None = None  # of `info`, while the engine is up
        self._shown_labels: Mapping[str, str] = {}
        self._engine_works = engine_works
        self._works = True
        self._looked_at = 0.0
        self._restarts = 0
        self._reported: dict[Sample, float] = defaultdict(float)
        self._with_engine = with_engine
        kinds = backend.MetricFamily
        # A family must outlive its metrics.
        self._families = {
            name: backend.MetricFamily(name=PREFIX + name, description=metric.help, kind=getattr(kinds, metric.kind))
            for name, metric in METRICS.items()
            if with_engine or not metric.of_engine
        }
        self._samples: dict[Sample, Any] = {}
        for name, family in self._families.items():
            options = {"buckets": SECONDS_BUCKETS} if name in HISTOGRAMS else {}
            for labels in METRICS[name].label_sets():
                self._samples[name, tuple(labels.values())] = family.Metric(labels=labels, **options)
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

    def finished(self, ended: EndedRequest) -> None:
        """A request that was submitted has ended. The Router's refusals have neither a duration nor tokens."""
        with self._lock:
            self._counted["requests_total", (ended.status,)] += 1
            if ended.status != "rejected":
                self._observed["request_seconds"].append(ended.seconds)
                self._counted["request_tokens_total", (ended.status, "prompt")] += ended.num_prompt_tokens
                self._counted["request_tokens_total", (ended.status, "answer")] += ended.num_answer_tokens

    def refused(self, error: Exception) -> None:
        """A request ended before it was submitted: with an error of its own or the server's, or its time was up."""
        code = error.code if isinstance(error, RequestError) else "INTERNAL"
        with self._lock:
            self._counted["requests_total", (STATUS_OF_REFUSAL[code],)] += 1

    # From the engine

    def engine_stats(self, stats: EngineStats) -> None:
        """Take the engine's newest counters."""
        with self._lock:
            self._engine = stats

    def engine_up(self, labels: Mapping[str, str] | None) -> None:
        """The engine takes requests from now on, and these are the labels of `info`; None: it takes no more."""
        with self._lock:
            self._labels = labels

    def engine_restarted(self) -> None:
        """A new worker was started, which counts its totals from zero."""
        with self._lock:
            self._restarts += 1
            self._engine = None
            for sample in self._samples:
                if sample[0] in WORKER_TOTALS:
                    self._reported[sample] = 0

    def close(self) -> None:
        """Stop the thread, and let the metrics live as long as the process.

        Python would destroy them as it ends, when the memory shared with the server is gone, which crashes the process.
        Destroyed here, they would take the metrics of other processes with the same labels along: the server crashes.
        """
        self._closing.set()
        self._flusher.join()
        for kept in (self._samples, self._families):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))

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
        if self._with_engine:
            if time.monotonic() >= self._looked_at + WORKS_SECONDS:
                self._looked_at, self._works = time.monotonic(), self._engine_works()
            self._show_labels()
        for call, value in self._calls():
            call(value)
            time.sleep(PAUSE_SECONDS)

    def _show_labels(self) -> None:
        """Have `info` say 1 with the labels of the newest engine, and 0 with others, which the server never forgets."""
        labels = self._labels
        if not labels or labels == self._shown_labels:
            return
        if self._shown_labels:
            self._samples["info", tuple(self._shown_labels.values())].set(0)
        sample = "info", tuple(labels.values())
        if sample not in self._samples:
            self._samples[sample] = self._families["info"].Metric(labels=dict(labels))
        self._samples[sample].set(1)
        self._shown_labels = labels

    def _calls(self) -> list[tuple[Callable[[float], None], float]]:
        """The calls that carry over what has changed."""
        calls: list[tuple[Callable[[float], None], float]] = []
        with self._lock:
            counted, self._counted = self._counted, Counter()
            observed, self._observed = self._observed, {name: [] for name in HISTOGRAMS}
            changed = []
            for sample, value in self._engine_state():
                change = value - self._reported[sample]
                if change:
                    self._reported[sample] = value
                    is_counter = METRICS[sample[0]].kind == "COUNTER"
                    changed.append((sample, change if is_counter else value))
        calls += [(self._samples[sample].increment, count) for sample, count in counted.items() if count]
        for name, values in observed.items():
            observe = self._samples[name, ()].observe
            calls += [(observe, value) for value in values[:: -(-len(values) // MAX_OBSERVATIONS) or 1]]
        for sample, value in changed:
            made = self._samples[sample]
            calls.append((made.increment if METRICS[sample[0]].kind == "COUNTER" else made.set, value))
        return calls

    def _engine_state(self) -> Iterator[tuple[Sample, float]]:
        if not self._with_engine:
            return
        yield ("engine_up", ()), float(self._labels is not None and self._works)
        yield ("engine_restarts_total", ()), self._restarts
        if self._engine is None:
            return
        yield ("kv_cache_utilization", ()), self._engine.kv_tokens_used / max(1, self._engine.kv_tokens_total)
        for name, value in vars(self._engine).items():
            if isinstance(value, Mapping):
                yield from (((name, (label,)), count) for label, count in value.items())
            else:
                yield (name, ()), value
