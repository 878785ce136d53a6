# SPDX-License-Identifier: Apache-2.0
"""What streams have around them, played by the tests: the engine, the server and a detokenizer."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from lightllm_backend.generation.streams import Streams
from lightllm_backend.generation.token_times import EndedRequest
from lightllm_backend.messages.channel import Channel
from lightllm_backend.messages.return_messages import Introduction
from lightllm_backend.messages.seal import Purpose, Seal
from lightllm_backend.request import FinishReason, Request, RequestError, RequestOptions, SamplingParams, TokenChunk
from lightllm_backend.text.text_stream import TextStream
from lightllm_backend.text.tokenizer import Tokenizer

SEAL = Seal(b"k" * 32, Purpose.RETURNS)


class FakeResponder:
    def __init__(self) -> None:
        self.sent: list[TokenChunk] = []
        self.states: list[bytes | None] = []  # of decoding, which went along
        self.checks: list[bool] = []
        self.probes = 0
        self.cancelled = False
        self.questions = 0

    def send(self, chunk: TokenChunk, state: bytes | None, check_client: bool) -> None:
        assert not self.sent or self.last.finish_reason is None, "nothing may follow the last chunk"
        self.sent.append(chunk)
        self.states.append(state)
        self.checks.append(check_client)

    def probe(self) -> None:
        assert not self.sent or self.last.finish_reason is None, "nothing may follow the last chunk"
        self.probes += 1

    def is_cancelled(self) -> bool:
        self.questions += 1
        return self.cancelled

    @property
    def ids(self) -> list[list[int]]:
        return [chunk.token_ids for chunk in self.sent]

    @property
    def last(self) -> TokenChunk:
        return self.sent[-1]


class FakeObserver:
    def __init__(self) -> None:
        self.first: list[float] = []
        self.between = 0
        self.ended: list[str] = []
        self.requests: list[EndedRequest] = []
        self.seconds: list[float] = []

    def first_token(self, seconds: float, queue_seconds: float) -> None:
        self.seconds.append(seconds)
        self.first.append(queue_seconds)

    def next_token(self, seconds: float) -> None:
        self.seconds.append(seconds)
        self.between += 1

    def finished(self, ended: EndedRequest) -> None:
        self.requests.append(ended)
        self.seconds.append(ended.seconds)
        self.ended.append(ended.status)


class FakeEngine:
    """Takes requests; a test makes their chunks."""

    def __init__(self) -> None:
        self.requests: dict[str, Request] = {}
        self.on_chunk: dict[str, Callable[[TokenChunk], None]] = {}
        self.stopped: list[str] = []
        self.cancelled: list[str] = []
        self.refusal: RequestError | None = None
        self._numbers = itertools.count()

    def new_uid(self) -> str:
        return f"u{next(self._numbers)}"

    def submit(self, request: Request, on_chunk: Callable[[TokenChunk], None]) -> None:
        if self.refusal:
            raise self.refusal
        self.requests[request.uid], self.on_chunk[request.uid] = request, on_chunk

    def stop(self, uid: str) -> None:
        self.stopped.append(uid)

    def cancel(self, uid: str) -> None:
        self.cancelled.append(uid)

    def make(self, uid: str, ids: list[int], reason: FinishReason | None = None, **fields: Any) -> None:
        on_chunk = self.on_chunk[uid.partition("/")[0]]
        on_chunk(TokenChunk(uid, ids, fields.pop("log_probs", []), reason, **fields))


def submit(streams: Streams, tokenizer: Tokenizer, flow_control: bool = True, **sampling: Any) -> FakeResponder:
    responder = FakeResponder()
    options = RequestOptions(SamplingParams(**sampling), stream=True)
    text = TextStream.of(tokenizer, options, [1, 2])
    streams.submit([1, 2], options, 12.5, lambda uid, number: responder, flow_control, lambda: text)
    return responder


def introduced(streams: Streams) -> Channel:
    """A detokenizer's end of the return channel."""
    channel = Channel.connect(streams.return_address)
    channel.send(Introduction.under(SEAL))
    return channel
