# SPDX-License-Identifier: Apache-2.0
"""The soak's own judgement: which end a request has had, and what has grown."""

import json

import pytest

from perf.report.servers import soak
from perf.soak.__main__ import Sample, growth
from perf.soak.clients import Ask, http_end

ASK = Ask("http stream", "Hello", 3, None, bad=False)
HEAD = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"


def event(**values: object) -> str:
    return f"data: {json.dumps(values, ensure_ascii=False)}\n\n"


@pytest.mark.parametrize(
    ("text", "kind", "num_tokens"),
    [
        (
            HEAD + event(num_output_tokens=2, finish_reason="") + event(num_output_tokens=1, finish_reason="length"),
            "done",
            3,
        ),
        (HEAD + event(num_output_tokens=3, finish_reason="length", text_output="a\x85b"), "done", 3),
        (HEAD + event(num_output_tokens=2, finish_reason="length"), "wrong", 2),
        (HEAD + event(num_output_tokens=2, finish_reason=""), "connection ended", 0),
        (
            HEAD + event(num_output_tokens=2, finish_reason="") + event(error="UNAVAILABLE: gone"),
            "ended by an error",
            0,
        ),
        (HEAD + event(error="UNAVAILABLE: the queue is full"), "refused", 0),
        ("HTTP/1.1 500 \r\n\r\n" + json.dumps({"error": "INTERNAL: broken"}), "other error", 0),
        (HEAD + event(error="INVALID_ARG: no"), "wrong", 0),
        ("", "connection ended", 0),
    ],
)
def test_the_end_of_an_http_request(text: str, kind: str, num_tokens: int) -> None:
    end = http_end(ASK, text)
    assert (end.kind, end.num_tokens) == (kind, num_tokens)
    assert end.is_wrong == (kind == "wrong")


def test_a_bad_request_that_is_served_is_wrong() -> None:
    bad = Ask("http whole", "Hello", 3, None, bad=True)
    answer = "HTTP/1.1 200 OK\r\n\r\n" + json.dumps({"num_output_tokens": 3, "finish_reason": "length"})
    assert http_end(bad, answer).kind == "wrong"
    assert (
        http_end(bad, "HTTP/1.1 400 \r\n\r\n" + json.dumps({"error": "INVALID_ARG: no"})).kind == "bad request refused"
    )


def test_growth_compares_the_second_fifth_with_the_last() -> None:
    samples = [Sample(float(at), {"worker": 100.0 + at, "tokenizer": 50.0}, 0, 0) for at in range(10)]
    assert growth(samples) == {"tokenizer": 0.0, "worker": 6.0}


def test_the_report() -> None:
    result = {
        "model": "embedded", "seconds": 600.0, "clients": 32, "ends": {"left": 10, "done": 200},
        "faults": [
            {"role": "worker", "signal": "SIGKILL", "at": 1.0, "back_after": 4.25},
            {"role": "worker", "signal": "SIGKILL", "at": 9.0, "back_after": None},
        ],
        "growth_mb": {"worker": 0.5}, "commit": "abc", "date": "2026-11-29T00:00",
        "versions": {"torch": "2.11.0", "triton": None}, "machine": {"gpu": None, "cpu": "a CPU", "cores": 2},
    }  # fmt: skip
    lines = soak(result)
    assert "| done | 200 |" in lines
    assert "| SIGKILL, worker | 2 | 4.2, never |" in lines
    assert "| worker | +0.5 |" in lines
