# SPDX-License-Identifier: Apache-2.0
"""What the front passes on besides answers: metrics to whoever scrapes it, and the caller's id and trace."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lightllm_backend.front import engine_load
from lightllm_backend.front.caller import CALLER, Caller
from lightllm_backend.front.state import Front
from tests.front.pretended import Caller as Call
from tests.front.pretended import PretendedClient, PretendedStream

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class ListeningClient(PretendedClient):
    """Notes whose request each call is for."""

    callers: list[Caller]

    def stream(self, prompt: Any, **options: Any) -> PretendedStream:
        self.callers = [*getattr(self, "callers", []), CALLER.get()]
        return super().stream(prompt, **options)


def test_the_metrics_are_passed_on_as_they_are(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["lightllm_queued_requests 7\n"]
    monkeypatch.setattr(engine_load, "_metrics", lambda address: texts[0])
    answer = call("GET", "/metrics")
    assert (answer.status_code, answer.text) == (200, texts[0])
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"


def test_without_metrics_the_server_is_unavailable(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_load, "_metrics", lambda address: "")
    assert Call(replace(front))("GET", "/metrics").status_code == 503
    assert Call(replace(front), api_keys=("secret",))("GET", "/metrics").status_code == 401


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": ["a", "b"]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
    ],
)
def test_the_engine_learns_the_caller_s_id_and_trace(
    front: Front, client: PretendedClient, path: str, body: dict[str, Any], stream: bool
) -> None:
    listening = ListeningClient(client.items)
    call = Call(replace(front, client=listening))  # type: ignore[arg-type]
    headers = {"x-request-id": "mine", "traceparent": TRACEPARENT}
    assert call.post(path, {**body, "model": "tiny", "stream": stream}, headers=headers).status_code == 200
    assert set(listening.callers) == {Caller("mine", (("traceparent", TRACEPARENT),))}
    answer = call.post(path, {**body, "model": "tiny", "stream": stream})
    assert listening.callers[-1] == Caller(answer.headers["x-request-id"], ())
