# SPDX-License-Identifier: Apache-2.0
"""What the first step does with a request: refuse it, encode it at once, or in the lane for long prompts."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lightllm_backend.config import PROBE_KEY_VARIABLE, EngineConfig
from lightllm_backend.lengths import LengthLimits
from lightllm_backend.messages.engine_load import EngineLoad
from lightllm_backend.text.tokenizer import Tokenizer
from lightllm_backend.triton_server import responses
from lightllm_backend.triton_server.entrance import Entered, Entrance

DATA = Path(__file__).parents[1] / "data"
MAX_INPUT = 2000
SHORT, LONG = "the", "the " * 1500
SHORT_TOKENS, LONG_TOKENS = 2, 1502


class Request:
    """A request as Triton server hands it over; `answer` is what was sent later."""

    def __init__(self, text: str | None = None, ids: list[int] | None = None, **parameters: Any) -> None:
        self.values = {"text_input": [text.encode()]} if text is not None else {"input_ids": ids}
        self._parameters = json.dumps(parameters)
        self.gone, self.answered = False, threading.Event()
        self.answer: Any = None

    def inputs(self) -> list[Any]:
        return [
            SimpleNamespace(name=lambda name=name: name, as_numpy=lambda value=value: np.array(value))
            for name, value in self.values.items()
        ]

    def parameters(self) -> str:
        return self._parameters

    def timeout(self) -> int:
        return 0

    def get_response_sender(self) -> Any:
        return SimpleNamespace(send=self._send, is_cancelled=lambda: self.gone)

    def _send(self, response: Any, flags: int) -> None:  # noqa: ARG002, as of the server
        self.answer = response
        self.answered.set()


class Place:
    """An entrance, and what became of those who came. Only the lane waits for `gate`."""

    def __init__(self, directory: Path) -> None:
        self.refused: list[str] = []
        self.load = EngineLoad(directory)
        self.gate = threading.Event()
        self.entrance = Entrance(
            EngineConfig(max_queue_size=2, max_prompt_bytes=100_000),
            Tokenizer.load(DATA / "llama"),
            LengthLimits(MAX_INPUT, "max_req_input_len", MAX_INPUT + 1, "max_req_total_len"),
            SimpleNamespace(refused=lambda request, error: self.refused.append(str(error))),  # type: ignore[arg-type]
            directory,
            self.go_on,
        )

    def go_on(self, entered: Entered) -> Any:
        if len(entered.prompt.token_ids) > SHORT_TOKENS:
            assert self.gate.wait(60)
        return len(entered.prompt.token_ids)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    utils = SimpleNamespace(
        TRITONSERVER_RESPONSE_COMPLETE_FINAL=1,
        TritonError=type("TritonError", (), {"INVALID_ARG": 1, "UNAVAILABLE": 2, "CANCELLED": 3, "INTERNAL": 4,
                                             "__init__": lambda self, text, code: setattr(self, "text", text)}),
        InferenceResponse=lambda error: error.text,
    )  # fmt: skip
    monkeypatch.setattr(responses, "pb_utils", utils, raising=False)
    made = Place(tmp_path)
    yield made
    made.gate.set()
    made.entrance.close()


def test_short_prompts_do_not_wait_for_long_ones(place: Place) -> None:
    long = Request(LONG)
    assert place.entrance.take(long) is None
    assert place.entrance.take(Request(SHORT)) == SHORT_TOKENS
    assert not long.answered.is_set()
    place.gate.set()
    assert long.answered.wait(10)
    assert long.answer == LONG_TOKENS
    assert place.refused == []


def test_a_text_that_cannot_fit_is_not_encoded(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place.entrance._tokenizer, "_encode", lambda text, parse_special: pytest.fail("encoded"))
    answer = place.entrance.take(Request("x" * (9 * MAX_INPUT + 1)))
    assert answer == (
        "INVALID_ARG: text_input has 18001 bytes, which are at least 2001 tokens (one stands for at most 9 bytes); "
        "allowed: at most 2000 prompt tokens (max_req_input_len)"
    )
    many = place.entrance.take(Request(ids=[5] * (MAX_INPUT + 1)))
    assert many.startswith("INVALID_ARG: the prompt has 2001 tokens")
    assert place.refused == [answer, many]


def test_a_text_of_too_many_tokens_goes_no_further(place: Place) -> None:
    request = Request("x" * (9 * MAX_INPUT))
    assert place.entrance.take(request) is None
    assert request.answered.wait(10)
    assert "tokens and max_tokens is 16; allowed: at most 2000 prompt tokens" in request.answer
    assert place.refused == [request.answer]


def test_the_least_limit_is_named_at_once(place: Place) -> None:
    """A client that shortened its prompt to the model's limit would be refused a second time, by the pool's."""
    request = Request(ids=[5] * (MAX_INPUT + 1))
    for pool, limit in (
        ((0, 0), "2000 prompt tokens (max_req_input_len)"),
        ((100, 100), "100 prompt tokens (the KV pool of 100 tokens)"),
        ((100, 300), "300 prompt tokens (the KV pool of 100 tokens)"),  # with windows
        ((2000, 2000), "2000 prompt tokens (max_req_input_len)"),
    ):
        place.load.publish_pool(*pool)
        assert place.entrance.take(request).endswith(f"max_tokens is 16; allowed: at most {limit}")
    place.load.publish_pool(100, 100)
    text = place.entrance.take(Request("x" * 1000))
    assert text.endswith("at least 112 tokens (one stands for at most 9 bytes); "
                         "allowed: at most 100 prompt tokens (the KV pool of 100 tokens)")  # fmt: skip


def test_a_full_lane_refuses_at_once(place: Place) -> None:
    requests = [Request(LONG) for _ in range(5)]
    answers = [place.entrance.take(request) for request in requests]
    refused = [answer for answer in answers if answer is not None]
    assert len(refused) >= 2, "one is encoded and two wait"
    assert place.refused == refused
    assert all("UNAVAILABLE: 2 long prompts of 12000 bytes wait to be tokenized" in answer for answer in refused)


def test_who_has_gone_is_not_encoded(place: Place) -> None:
    first, second = Request(LONG), Request(LONG)
    place.entrance.take(first)
    place.entrance.take(second)
    second.gone = True
    place.gate.set()
    assert second.answered.wait(10)
    assert second.answer == "CANCELLED: the client has gone"


def test_while_the_queue_is_full_nothing_is_encoded(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PROBE_KEY_VARIABLE, "secret")
    place.load.publish(2, 2)
    assert place.entrance.take(Request(SHORT)) == SHORT_TOKENS, "one passes now and then"
    request = Request(SHORT)
    assert place.entrance.take(request) == "UNAVAILABLE: the queue is full (2 requests)"
    assert place.entrance.take(Request(SHORT, tenant="another")) == SHORT_TOKENS, "the Router makes room for it"
    assert place.entrance.take(Request(SHORT, probe_key="secret")) == SHORT_TOKENS
    place.load.publish(1, 2)
    assert place.entrance.take(Request(SHORT)) == SHORT_TOKENS
    assert place.refused == ["UNAVAILABLE: the queue is full (2 requests)"]
