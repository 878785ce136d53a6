# SPDX-License-Identifier: Apache-2.0
"""EngineClient: how a process that does only I/O uses the engine. No torch."""

from __future__ import annotations

import itertools
import logging
import secrets
import threading
from collections.abc import Callable
from typing import NamedTuple

from lightllm_backend.messages.channel import MAX_UNSENT_BYTES, Channel, ChannelClosed, Message
from lightllm_backend.messages.engine_messages import (
    ENGINE_STOPPED,
    Cancel,
    EngineInfo,
    Ready,
    Stats,
    Stop,
    Submit,
    Tokens,
)
from lightllm_backend.options import check_lengths, check_prompt_logprobs, check_token_ids, fitted
from lightllm_backend.request import FinishReason, Request, RequestError, TokenChunk
from lightllm_backend.router.statistics import EngineStats

RECONNECT_SECONDS = 0.05  # a worker takes seconds to start; a client should not add to that
# After messages that make no sense: the next ones hardly will, and each attempt fills the log.
FAILURE_PAUSE_SECONDS = 1.0
# Requests that a worker has not read yet, since a step takes long or the worker stands still. The other half of what a
# channel holds is for cancellations.
MAX_UNREAD_BYTES = MAX_UNSENT_BYTES // 2

log = logging.getLogger(__name__)

OnChunk = Callable[[TokenChunk], None]


class _Outstanding(NamedTuple):
    """A request that has not ended."""

    uid: str
    num_prompt_tokens: int
    on_chunk: OnChunk


class EngineClient:
    """Submits requests to the worker at `address` and hands each request its chunks. Several clients share one worker.

    Owns the table of outstanding requests: each submitted request gets exactly one chunk with a finish reason, even if
    the worker dies, and chunks of requests that have ended are dropped. It connects and reconnects by itself. It calls
    `on_chunk`, `on_stats` and `on_up` on its reader thread, so they must not block.
    """

    def __init__(
        self,
        address: str,
        on_stats: Callable[[EngineStats], None] = lambda stats: None,
        on_up: Callable[[EngineInfo | None], None] = lambda info: None,
    ) -> None:
        """on_up: told that a worker is connected, and that it is gone (None)."""
        self._address = address
        self._on_stats = on_stats
        self._on_up = on_up
        self._lock = threading.Lock()  # guards the five below
        self._next_number = 0
        self._channel: Channel | None = None
        self._info: EngineInfo | None = None
        self._outstanding: dict[int, _Outstanding] = {}  # by the request's number in the messages
        self._closed = False
        self._ready = threading.Event()
        self._uids = itertools.count()
        self._reader = threading.Thread(target=self._read_for_ever, name="engine-client", daemon=True)
        self._reader.start()

    @property
    def up(self) -> bool:
        """Whether a worker is connected."""
        return self._ready.is_set()

    def wait_ready(self, timeout: float | None = None) -> EngineInfo:
        """Block until a worker has connected; RequestError UNAVAILABLE after `timeout` seconds."""
        if not self._ready.wait(timeout) or self._info is None:
            raise RequestError("UNAVAILABLE", "the engine is not up; try again")
        return self._info

    def new_uid(self) -> str:
        """A uid that no other request of this engine has, of any client, and that nobody can guess."""
        return f"{next(self._uids)}-{secrets.token_hex(16)}"

    def submit(self, request: Request, on_chunk: OnChunk) -> None:
        """Send a request whose uid is from `new_uid`. Its chunks may come before this returns.

        `on_chunk` gets the chunks of all its answers, each with its answer's uid (`Request.uids`).
        Raises RequestError: UNAVAILABLE if there is no worker or it has too much to read, INVALID_ARG for a request
        that can never run. It never waits for the worker.
        """
        info = self.wait_ready(timeout=0)
        check_lengths(len(request.prompt_ids), request.sampling.max_tokens, info.lengths)
        request = fitted(request, info.lengths)
        check_token_ids("input_ids", request.prompt_ids, info.vocab_size)
        check_token_ids("stop_token_ids (or end_id)", request.sampling.stop_token_ids, info.vocab_size)
        check_token_ids("allowed_token_ids", request.sampling.allowed_token_ids, info.vocab_size)
        check_token_ids("logit_bias", tuple(token_id for token_id, _ in request.sampling.logit_bias), info.vocab_size)
        if request.sampling.prompt_logprobs >= 0:
            check_prompt_logprobs(len(request.prompt_ids), request.sampling.prompt_logprobs, info.vocab_size)
        uids = request.uids
        with self._lock:
            channel = self._channel
            if channel is None:
                raise RequestError("UNAVAILABLE", "the engine is not up; try again")
            if channel.num_unsent > MAX_UNREAD_BYTES:
                raise RequestError("UNAVAILABLE", "the engine takes no requests at present; try again")
            number, self._next_number = self._next_number, self._next_number + len(uids)
            for place, uid in enumerate(uids):
                self._outstanding[number + place] = _Outstanding(uid, len(request.prompt_ids), on_chunk)
        try:
            channel.send(Submit(request, number))
        except ChannelClosed:
            with self._lock:
                known = [self._outstanding.pop(number + place, None) for place in range(len(uids))]
            if any(known):  # else the reader has already ended it
                raise RequestError("UNAVAILABLE", "the engine is not up; try again") from None

    def cancel(self, uid: str) -> None:
        """Cancel an answer whose client is gone. Its last chunk still comes."""
        self._send(Cancel(uid))

    def stop(self, uid: str) -> None:
        """Stop an answer in which a stop string was found. Its last chunk still comes."""
        self._send(Stop(uid))

    def close(self) -> None:
        """Disconnect; every outstanding request ends with UNAVAILABLE."""
        with self._lock:
            self._closed = True
            channel = self._channel
        if channel:
            channel.close()
        self._reader.join()

    def _send(self, message: Message) -> None:
        channel = self._channel
        if channel:
            try:
                channel.send(message)
            except ChannelClosed:
                pass  # the reader ends everything that is outstanding

    def _read_for_ever(self) -> None:
        pause = threading.Event()
        while not self._closed:
            try:
                self._read(Channel.connect(self._address))
            except Exception as error:  # without this thread every request would wait for ever
                expected = isinstance(error, ChannelClosed)
                if not expected:
                    log.exception("the engine's messages cannot be read; its requests end, and the client reconnects")
                self._lose_worker()
                pause.wait(RECONNECT_SECONDS if expected else FAILURE_PAUSE_SECONDS)

    def _read(self, channel: Channel) -> None:
        try:
            ready = channel.receive()
            assert isinstance(ready, Ready), ready
            with self._lock:
                if self._closed:
                    return
                self._channel, self._info = channel, ready.info
            self._ready.set()
            self._on_up(ready.info)
            while True:
                message = channel.receive()
                if isinstance(message, Tokens):
                    self._deliver(message)
                elif isinstance(message, Stats):
                    self._on_stats(message.stats)
        finally:
            channel.close()

    def _deliver(self, tokens: Tokens) -> None:
        """Hand the tokens of one step to their requests."""
        with self._lock:
            going_on = [self._outstanding.get(number) for number in tokens.numbers.tolist()]
            others = [
                self._outstanding.get(number) if chunk.finish_reason is None else self._outstanding.pop(number, None)
                for number, chunk in tokens.chunks
            ]
        # Chunks go before the packed tokens: first tokens, which users wait for most, are among them.
        for other, (_, chunk) in zip(others, tokens.chunks, strict=True):
            if other:
                other.on_chunk(chunk)
        for request, token_id in zip(going_on, tokens.token_ids.tolist(), strict=True):
            if request:
                request.on_chunk(TokenChunk(request.uid, [token_id], [], None, request.num_prompt_tokens))

    def _lose_worker(self) -> None:
        if self._ready.is_set():
            self._on_up(None)
        self._ready.clear()
        with self._lock:
            lost = self._outstanding
            self._channel, self._outstanding = None, {}
        for request in lost.values():
            request.on_chunk(TokenChunk(request.uid, [], [], FinishReason.FAILED, error=ENGINE_STOPPED))
