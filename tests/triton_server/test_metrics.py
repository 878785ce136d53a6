# SPDX-License-Identifier: Apache-2.0
"""Metrics, with a stand-in for Triton server's interface. Flushes are made by hand."""

import itertools
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest

from lightllm_backend.generation.token_times import EndedRequest
from lightllm_backend.request import RequestError
from lightllm_backend.router.statistics import EngineStats
from lightllm_backend.triton_server import metrics
from lightllm_backend.triton_server.metric_table import METRICS, PREFIX, STATUSES
from lightllm_backend.triton_server.metrics import MAX_OBSERVATIONS, Metrics, info_labels
from lightllm_backend.version import VERSION
from tests.worker.engine_harness import INFO


class FakeMetric:
    def __init__(self, labels: dict[str, str], buckets: list[float] | None = None) -> None:
        self.labels, self.buckets = labels, buckets
        self.value = 0.0
        self.observed: list[float] = []
        self.calls = 0

    def increment(self, value: float) -> None:
        assert value > 0, "the server refuses others for a counter"
        self.value += value
        self.calls += 1

    def set(self, value: float) -> None:
        self.value = value
        self.calls += 1

    def observe(self, value: float) -> None:
        self.observed.append(value)


class FakeBackend:
    """What Metrics uses of triton_python_backend_utils."""

    def __init__(self) -> None:
        families: dict[str, FakeFamily] = {}
        self.families = families

        class MetricFamily(FakeFamily):
            def __init__(self, **options: Any) -> None:
                super().__init__(**options)
                assert self.name not in families, "the server refuses a family twice"
                families[self.name] = self

        self.MetricFamily = MetricFamily

    def __getitem__(self, name: str) -> FakeMetric:
        [metric] = self.families[f"lightllm_{name}"].metrics
        return metric

    def values(self, name: str) -> dict[tuple[str, ...], float]:
        return {tuple(metric.labels.values()): metric.value for metric in self.families[f"lightllm_{name}"].metrics}

    def requests(self) -> dict[str, float]:
        return {status: value for (status,), value in self.values("requests_total").items()}


class FakeFamily:
    COUNTER: ClassVar[str] = "counter"
    GAUGE: ClassVar[str] = "gauge"
    HISTOGRAM: ClassVar[str] = "histogram"

    def __init__(self, name: str, description: str, kind: str) -> None:
        assert description
        self.name, self.kind = name, kind
        self.metrics: list[FakeMetric] = []

    def Metric(self, **options: Any) -> FakeMetric:  # noqa: N802 (the server's name)
        self.metrics.append(FakeMetric(**options))
        return self.metrics[-1]


@pytest.fixture(autouse=True)
def never_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "FLUSH_SECONDS", 3600.0)


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def engine_metrics(backend: FakeBackend) -> Iterator[Metrics]:
    made = Metrics(backend, with_engine=True)
    yield made
    made.close()


LABELS = info_labels(INFO, "counting")


def kinds(of_engine: bool) -> dict[str, str]:
    return {PREFIX + name: metric.kind.lower() for name, metric in METRICS.items() if of_engine or not metric.of_engine}


def test_all_metrics_of_the_table_are_there(backend: FakeBackend, engine_metrics: Metrics) -> None:
    assert {name: family.kind for name, family in backend.families.items()} == kinds(of_engine=True)
    buckets = backend["queue_seconds"].buckets
    assert buckets is not None
    assert buckets == sorted(buckets)
    assert set(backend.values("steps_total")) == {("prefill",), ("decode",), ("mixed",)}


def test_a_process_without_the_engine_reports_requests_only(backend: FakeBackend) -> None:
    made = Metrics(backend, with_engine=False)
    made.engine_stats(EngineStats(queued_requests=3))
    made._flush()
    made.close()
    assert {name: family.kind for name, family in backend.families.items()} == kinds(of_engine=False)


def test_tokens_are_counted_by_status(backend: FakeBackend, engine_metrics: Metrics) -> None:
    engine_metrics.finished(EndedRequest("stop", 1.0, num_prompt_tokens=7, num_cached_tokens=4, num_answer_tokens=3))
    engine_metrics.finished(EndedRequest("stop", 1.0, num_prompt_tokens=5, num_answer_tokens=1))
    engine_metrics.finished(EndedRequest("rejected", 0.0, num_prompt_tokens=9))
    engine_metrics._flush()
    counted = {labels: value for labels, value in backend.values("request_tokens_total").items() if value}
    assert counted == {("stop", "prompt"): 12, ("stop", "answer"): 4}


def test_the_info_is_that_of_the_newest_engine(backend: FakeBackend, engine_metrics: Metrics) -> None:
    engine_metrics._flush()
    assert backend.values("info") == {}, "nothing is known before the engine is up"
    for slots in ("500", "500", "700", "500", "700"):
        engine_metrics.engine_up(LABELS | {"slots": slots})
        engine_metrics._flush()
        engine_metrics.engine_up(None)
    shown = backend.families["lightllm_info"].metrics
    assert [(one.labels["slots"], one.value) for one in shown] == [("500", 0), ("700", 1)]
    assert LABELS["version"] == VERSION
    assert set(LABELS) == set(METRICS["info"].labels)
    assert int(LABELS["max_req_total_len"]) == INFO.lengths.max_total


def test_requests_are_counted_by_status(backend: FakeBackend, engine_metrics: Metrics) -> None:
    for status in ("stop", "length", "length", "cancelled", "failed"):
        engine_metrics.finished(EndedRequest(status, 1.0))
    engine_metrics.refused(RequestError("UNAVAILABLE", "the queue is full"))
    assert set(backend.requests().values()) == {0.0}, "nothing is carried over before a flush"
    engine_metrics._flush()
    expected = {"stop": 1, "length": 2, "cancelled": 1, "failed": 1, "rejected": 1}
    assert set(expected) == set(STATUSES)
    assert backend.requests() == expected
    engine_metrics._flush()
    assert backend.requests() == expected


def test_times_are_observed(backend: FakeBackend, engine_metrics: Metrics) -> None:
    engine_metrics.first_token(0.5, queue_seconds=0.25)
    engine_metrics.next_token(0.01)
    engine_metrics.next_token(0.02)
    engine_metrics.finished(EndedRequest("stop", 2.0))
    engine_metrics._flush()
    engine_metrics._flush()
    assert backend["time_to_first_token_seconds"].observed == [0.5]
    assert backend["queue_seconds"].observed == [0.25]
    assert backend["inter_token_seconds"].observed == [0.01, 0.02]
    assert backend["request_seconds"].observed == [2.0]


@pytest.mark.parametrize("count", [0, 1, MAX_OBSERVATIONS, MAX_OBSERVATIONS + 1, 10 * MAX_OBSERVATIONS + 3])
def test_of_very_many_an_even_choice_is_observed(backend: FakeBackend, engine_metrics: Metrics, count: int) -> None:
    for number in range(count):
        engine_metrics.next_token(float(number))
    engine_metrics._flush()
    observed = backend["inter_token_seconds"].observed
    assert len(observed) <= MAX_OBSERVATIONS
    if count <= MAX_OBSERVATIONS:
        assert observed == [float(number) for number in range(count)]
    else:
        assert len(observed) >= MAX_OBSERVATIONS / 2
        assert len({after - before for before, after in itertools.pairwise(observed)}) == 1


def test_the_engine_s_state(backend: FakeBackend, engine_metrics: Metrics) -> None:
    engine_metrics.engine_up(LABELS)
    engine_metrics.engine_stats(EngineStats(1, 2, 30, 4, 100, 50, 60))
    engine_metrics._flush()
    state = [name for name, metric in METRICS.items() if metric.kind == "GAUGE" and not metric.labels]
    assert {name: backend[name].value for name in state} == {
        "queued_requests": 1, "running_requests": 2, "kv_tokens_used": 30, "kv_tokens_cached": 4,
        "kv_tokens_total": 100, "engine_up": 1, "kv_cache_utilization": 0.3,
    }  # fmt: skip
    steps = {"prefill": 2, "decode": 5, "mixed": 1}
    engine_metrics.engine_stats(EngineStats(0, 0, 0, 0, 100, 55, 70, steps_total=steps, prefix_cache_hits_total=9))
    engine_metrics.engine_up(None)
    engine_metrics._flush()
    assert backend["kv_tokens_used"].value == backend["queued_requests"].value == backend["engine_up"].value == 0
    assert backend["prompt_tokens_total"].value == 55
    assert backend["generated_tokens_total"].value == 70
    assert backend.values("steps_total") == {("prefill",): 2, ("decode",): 5, ("mixed",): 1}
    assert backend["prefix_cache_hits_total"].value == 9


def test_an_engine_that_stands_still_is_not_up(backend: FakeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "WORKS_SECONDS", 0.0)
    works = [True, False, True]
    engine_metrics = Metrics(backend, with_engine=True, engine_works=lambda: works.pop(0))
    engine_metrics.engine_up(LABELS)
    seen = []
    for _ in range(3):
        engine_metrics._flush()
        seen.append(backend["engine_up"].value)
    engine_metrics.close()
    assert seen == [1, 0, 1]


def test_what_has_not_changed_is_not_carried_over_again(backend: FakeBackend, engine_metrics: Metrics) -> None:
    for _ in range(3):
        engine_metrics.engine_stats(EngineStats(1, 2, 30, 4, 100, 50, 60))
        engine_metrics._flush()
    assert backend["running_requests"].calls == backend["prompt_tokens_total"].calls == 1


def test_totals_go_on_after_a_restart(backend: FakeBackend, engine_metrics: Metrics) -> None:
    engine_metrics.engine_stats(EngineStats(prompt_tokens_total=50, generated_tokens_total=60))
    engine_metrics._flush()
    engine_metrics.engine_restarted()
    engine_metrics._flush()
    engine_metrics.engine_stats(EngineStats(prompt_tokens_total=3, generated_tokens_total=4))
    engine_metrics._flush()
    assert backend["engine_restarts_total"].value == 1
    assert backend["prompt_tokens_total"].value == 53
    assert backend["generated_tokens_total"].value == 64


def test_the_thread_carries_over_by_itself(backend: FakeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "FLUSH_SECONDS", 0.005)
    made = Metrics(backend, with_engine=False)
    made.refused(RequestError("INVALID_ARG", "too long"))
    for _ in range(1000):
        if backend.requests()["rejected"]:
            break
        made._closing.wait(0.005)
    made.close()
    assert backend.requests()["rejected"] == 1
    assert not made._flusher.is_alive()


def test_metrics_outlive_the_interpreter() -> None:
    """Python would destroy them as it ends, once no thread uses them."""
    code = """
from lightllm_backend.triton_server.metrics import Metrics
from tests.triton_server.test_metrics import FakeBackend, FakeFamily, FakeMetric
FakeMetric.__del__ = FakeFamily.__del__ = lambda self: print("destroyed")
metrics = Metrics(FakeBackend(), with_engine=True)
"""
    stops_the_thread = "metrics._closing.set(); metrics._flusher.join()"
    for end, is_destroyed in (("metrics.close()", False), (stops_the_thread, True)):
        done = subprocess.run([sys.executable, "-c", code + end], check=True, capture_output=True, text=True)
        assert ("destroyed" in done.stdout) == is_destroyed
