# SPDX-License-Identifier: Apache-2.0
"""Which requests the log and the spans tell of, and what. The end-to-end tests have a server's own."""

from __future__ import annotations

import logging
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from lightllm_backend.config import EngineConfig
from lightllm_backend.generation.token_times import EndedRequest, Identity
from lightllm_backend.launch import trace_options as trace_options_module
from lightllm_backend.launch.trace_options import TraceError, trace_options
from lightllm_backend.logs import _FACTS
from lightllm_backend.request import RequestError
from lightllm_backend.triton_server.telemetry import Telemetry

STATUSES = ("stop", "length", "cancelled", "failed", "rejected")


class FakeMetrics:
    def __init__(self) -> None:
        self.told: list[str] = []

    def first_token(self, seconds: float, queue_seconds: float) -> None: ...
    def next_token(self, seconds: float) -> None: ...
    def close(self) -> None: ...

    def finished(self, ended: EndedRequest) -> None:
        self.told.append(ended.status)

    def refused(self, _error: Exception) -> None:
        self.told.append("refused")


def request_of(request_id: str) -> Any:
    """A request of Triton server's; whoever asks for its trace fails."""
    return SimpleNamespace(request_id=lambda: request_id)


def lines_of(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [getattr(record, _FACTS) for record in caplog.records if record.name == "lightllm.request"]


def telemetry_of(**settings: Any) -> tuple[Telemetry, FakeMetrics]:
    metrics = FakeMetrics()
    return Telemetry(metrics, EngineConfig(**settings), "m"), metrics  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("log_requests", "told"), [("none", ()), ("failed", ("failed", "rejected")), ("all", (*STATUSES, "rejected"))]
)
def test_the_log_has_the_requests_that_are_asked_for(
    caplog: pytest.LogCaptureFixture, log_requests: str, told: tuple[str, ...]
) -> None:
    caplog.set_level(logging.INFO)
    threads = threading.active_count()
    telemetry, metrics = telemetry_of(log_requests=log_requests)
    assert threading.active_count() - threads == (log_requests != "none"), "what is off costs nothing"
    identity = telemetry.identity(request_of("r"), "a", lambda: "the prompt")
    for status in STATUSES:
        telemetry.finished(EndedRequest(status, 0.5, identity))
    if log_requests == "all":
        telemetry.refused(request_of("r"), RequestError("INVALID_ARG", "text_input is 'the prompt'"))
    telemetry.close()
    assert metrics.told[: len(STATUSES)] == list(STATUSES)
    lines = lines_of(caplog)
    assert [line["status"] for line in lines] == list(told)
    assert all(line["request_id"] == "r" for line in lines)
    assert "the prompt" not in str(lines)
    assert "the prompt" not in caplog.text


def test_a_line_has_the_prompt_if_that_is_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    telemetry, _ = telemetry_of(log_requests="failed", log_prompts=True)
    identity = telemetry.identity(request_of("r"), "", lambda: "the prompt")
    telemetry.finished(EndedRequest("failed", 0.5, identity, "INTERNAL", num_prompt_tokens=2))
    telemetry.close()
    [line] = lines_of(caplog)
    assert (line["prompt"], line["error"], line["prompt_tokens"], line["queue_seconds"]) == (
        "the prompt", "INTERNAL", 2, None,
    )  # fmt: skip


def test_a_line_that_cannot_be_written_harms_no_other(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    def fails() -> str:
        raise ValueError("no such token")

    telemetry, metrics = telemetry_of(log_requests="all", log_prompts=True)
    for prompt in (fails, lambda: "fine"):
        telemetry.finished(EndedRequest("stop", 0.5, telemetry.identity(request_of("r"), "", prompt)))
    telemetry.close()
    assert metrics.told == ["stop", "stop"]
    assert [line["prompt"] for line in lines_of(caplog)] == ["fine"]
    assert "log and spans of request r are incomplete" in caplog.text


@pytest.mark.parametrize(
    ("context", "trace_id"),
    [("", ""), ("{}", ""), ('{"traceparent": "00-0af7-b7ad-01"}', "0af7"), ('{"traceparent": "nonsense"}', "")],
)
def test_the_trace_id_is_read_from_the_context(context: str, trace_id: str) -> None:
    assert Identity("r", trace_context=context).trace_id == trace_id


def test_the_server_traces_only_with_a_collector_and_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    assert trace_options(EngineConfig()) == []
    options = trace_options(EngineConfig(trace_url="http://127.0.0.1:4318/v1/traces", trace_rate=100))
    assert "--trace-config=opentelemetry,url=http://127.0.0.1:4318/v1/traces" in options
    assert "--trace-config=rate=100" in options
    monkeypatch.setattr(trace_options_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TraceError, match="pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-http"):
        trace_options(EngineConfig(trace_url="http://127.0.0.1:4318/v1/traces"))
