# SPDX-License-Identifier: Apache-2.0
"""Stream: one request between the engine, which makes a chunk a step, and its client, which takes what it can.

    on_chunk (engine client's reader thread)   the new tokens join the pending chunk
    send_pending (send queue's threads)        the pending chunk goes to the response sender
    delivered (return channel)                 the detokenizer acknowledges the chunk in flight
    check_client (Streams' watcher thread)     a client that is gone is found

In the ensemble a stream has one chunk in flight, without exception: any instance of the detokenizer takes any chunk, so
only this keeps the chunks of a request in order. Each chunk carries the decoding state that the acknowledgement of the
one before it has brought back. Tokens that the engine makes meanwhile join the pending chunk. A direct caller of
generation acknowledges nothing, and gets each chunk at once. A request that does not stream gets one chunk at the end.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from typing import NamedTuple, Protocol

from lightllm_backend.generation.send_queue import SendQueue
from lightllm_backend.generation.token_times import NOBODY, Identity, Observer, TokenTimes
from lightllm_backend.request import FinishReason, TokenChunk
from lightllm_backend.text.text_stream import TextStream

# How often a stream's client is checked: twice this and a round trip stay below the promised second
# (docs/triton_api.md).
CHECK_SECONDS = 0.25
# An acknowledgement comes in well under a second unless the whole machine stands still. If none arrives for this long,
# the detokenizer has crashed.
ACKNOWLEDGEMENT_SECONDS = 60.0
# After this the server is asked whether the client has gone. It knows if the steps are called one by one.
OVERDUE_SECONDS = 1.0


class Responder(Protocol):
    """Takes a stream's chunks: the server's response sender behind a thin adapter."""

    def send(self, chunk: TokenChunk, state: bytes | None, check_client: bool) -> None:
        """Send new tokens; the chunk with a finish reason is the last call.

        state: a packed DecodeState, where decoding has come to; None before the first chunk was delivered.
        check_client: have the detokenizer check whether the client is gone.
        """

    def probe(self) -> None:
        """Have the detokenizer check the client without a chunk; the client sees nothing."""

    def is_cancelled(self) -> bool:
        """Whether the server knows that the client is gone; it does for direct calls only."""


class StreamState(Enum):
    """IDLE ─> QUEUED or QUEUED_URGENTLY ─> IN_FLIGHT ─> IDLE …, or ENDED when the last chunk is sent."""

    IDLE = "idle"  # nothing to send, or not yet
    QUEUED = "queued"  # the pending chunk waits in the send queue
    QUEUED_URGENTLY = "queued urgently"  # it waits in the urgent line: the first chunk and the last
    IN_FLIGHT = "in flight"  # a chunk or a probe was sent and is not acknowledged
    ENDED = "ended"


class Delivery(NamedTuple):
    """How a request's chunks reach its client."""

    streaming: bool  # else all in one chunk at the end
    acknowledged: bool  # the detokenizer acknowledges each chunk


_END_ONLY = Delivery(streaming=False, acknowledged=False)


class Stream:
    """One request's state between the engine and its client, guarded by its own lock. It sends one chunk at a time."""

    def __init__(
        self,
        responder: Responder,
        streaming: bool,
        flow_control: bool,
        stop_text: TextStream | None,
        observer: Observer,
        send_queue: SendQueue,
        on_end: Callable[[], object] = lambda: None,
        identity: Identity = NOBODY,
    ) -> None:
        """stop_text: the text in which stop strings are found, if there are any. on_end: called after the last chunk.

        flow_control: whether a detokenizer acknowledges each chunk. identity: what the observer is told of the request.
        """
        self.coalesces = False  # see send_queue.Sender
        self.last_check = time.monotonic()  # of the client
        self._responder = responder
        self._delivery = Delivery(streaming, flow_control)
        self._stop_text = stop_text
        self._times = TokenTimes(observer, identity)
        self._send_queue = send_queue
        self._on_end = on_end
        self._lock = threading.Lock()  # guards what follows
        self._state = StreamState.IDLE
        self._pending: TokenChunk | None = None
        self._decode_state: bytes | None = None  # after the last delivered chunk; only the detokenizer reads it
        self._sent_any = False
        self._sent_at = 0.0  # the last chunk or probe
        self._check_with_next = False  # the next chunk checks the client

    @property
    def ended(self) -> bool:
        """Whether the last chunk was sent."""
        return self._state is StreamState.ENDED

    def on_chunk(self, chunk: TokenChunk) -> bool:
        """Take new tokens. Returns True if they complete a stop string, so that the engine should stop."""
        with self._lock:
            if self._has_last:
                return False
            stopped = self._cut_at_stop(chunk) if self._stop_text else None
            self._take(stopped or chunk)
            return stopped is not None

    def fail(self, last: TokenChunk) -> None:
        """End the request with the error in `last`, unless it has already ended."""
        with self._lock:
            if not self._has_last:
                self._stop_text = None
                self._take(last)

    def delivered(self, state: bytes | None = None) -> None:
        """The chunk in flight is acknowledged. A probe leaves no state."""
        with self._lock:
            self._decode_state = self._decode_state if state is None else state
            self._acknowledge()

    def lost(self) -> None:
        """The chunk in flight has failed, and the request with it: the server still needs its end, and only that."""
        with self._lock:
            self._lose()

    def check_client(self) -> bool:
        """Whether the client is known to be gone. If that cannot be known here, the next chunk or a probe will ask."""
        with self._lock:
            now = time.monotonic()
            if self.ended:
                return False  # the server crashes if it is asked after the last chunk
            if self._state is StreamState.IN_FLIGHT and now > self._sent_at + ACKNOWLEDGEMENT_SECONDS:
                self._lose()
                return True
            overdue = self._state is StreamState.IN_FLIGHT and now > self._sent_at + OVERDUE_SECONDS
            if overdue or (self._state is not StreamState.IN_FLIGHT and not self._delivery.acknowledged):
                self.last_check = now
                self._check_with_next = overdue
                return self._responder.is_cancelled()
            if self._state is not StreamState.IDLE or now < self._sent_at + CHECK_SECONDS:
                self._check_with_next = True
                return False
            self.last_check = self._sent_at = now
            self._state = StreamState.IN_FLIGHT
            self._send_queue.mark_in_flight(self)
            self._responder.probe()
        return False

    def send_pending(self) -> bool:
        """Send the pending chunk: the send queue calls this. Returns True if an acknowledgement will come."""
        with self._lock:
            chunk = self._take_pending()
            if chunk is None:
                return self._state is StreamState.IN_FLIGHT
            is_last = chunk.finish_reason is not None
            awaits_acknowledgement = self._delivery.acknowledged and not is_last
            self._state = StreamState.ENDED if is_last else StreamState.IN_FLIGHT
            self.coalesces = len(chunk.token_ids) > 1
            self._sent_any, self._sent_at = True, time.monotonic()
            check, self._check_with_next = self._check_with_next, False
            if check:
                self.last_check = self._sent_at
            state = self._decode_state
        # Without the lock: the engine client's reader, which has tokens for all streams, does not wait for the server.
        # Nobody else sends meanwhile, since the chunk is in flight.
        try:
            self._responder.send(chunk, state, check)
        finally:
            if is_last:
                self._on_end()
            if not awaits_acknowledgement:
                self.delivered()
        return awaits_acknowledgement

    @property
    def _has_last(self) -> bool:
        """Whether the last chunk is pending or was sent."""
        return self.ended or (self._pending is not None and self._pending.finish_reason is not None)

    @property
    def _may_send(self) -> bool:
        sending = self._state in (StreamState.IN_FLIGHT, StreamState.ENDED)
        return self._pending is not None and not sending and (self._delivery.streaming or self._has_last)

    def _take(self, chunk: TokenChunk) -> None:
        self._times.observe(chunk)
        self._pending = _join(self._pending, chunk)
        self._queue_pending()

    def _queue_pending(self) -> None:
        """Put the stream into the send queue if it may send; its first chunk and its last go into the urgent line."""
        if not self._may_send:
            return
        urgent = self._has_last or not self._delivery.acknowledged or not self._sent_any
        if self._state is StreamState.IDLE or (urgent and self._state is StreamState.QUEUED):
            self._state = StreamState.QUEUED_URGENTLY if urgent else StreamState.QUEUED
            self._send_queue.put(self, urgent)

    def _take_pending(self) -> TokenChunk | None:
        """The chunk to send now; None if this turn has come too late, after an urgent one, or too early."""
        if not self._may_send:
            if self._state in (StreamState.QUEUED, StreamState.QUEUED_URGENTLY):
                self._state = StreamState.IDLE
            return None
        chunk, self._pending = self._pending, None
        assert chunk is not None
        if chunk.error is not None and chunk.token_ids:
            # The ensemble drops the tokens of a response that is an error, so the error goes alone.
            error = replace(chunk.first(0), prompt_log_probs=None)
            if not self._delivery.streaming:
                return error
            chunk, self._pending = replace(chunk, finish_reason=None, error=None), error
        return chunk

    def _acknowledge(self) -> None:
        if self._state is StreamState.IN_FLIGHT:
            self._state = StreamState.IDLE
        self._send_queue.acknowledged(self)
        self._queue_pending()

    def _lose(self) -> None:
        self._delivery = _END_ONLY
        self._acknowledge()

    def _cut_at_stop(self, chunk: TokenChunk) -> TokenChunk | None:
        """The chunk up to the token that completes a stop string, as the last chunk; None if no token does."""
        text = self._stop_text
        assert text is not None
        before = text.num_tokens
        text.push(chunk.token_ids)
        if not text.stopped or chunk.error is not None:
            return None
        kept = text.num_tokens - before
        return replace(chunk.first(kept), finish_reason=FinishReason.STOP)


def _join(pending: TokenChunk | None, chunk: TokenChunk) -> TokenChunk:
    """The tokens of both as one chunk."""
    if pending is None:
        return chunk
    return replace(
        chunk,
        token_ids=pending.token_ids + chunk.token_ids,
        log_probs=pending.log_probs + chunk.log_probs,
        top_log_probs=pending.top_log_probs + chunk.top_log_probs,
        num_prompt_tokens=pending.num_prompt_tokens,  # the chunk of an engine that is gone has none
        queue_seconds=pending.queue_seconds,
        prompt_log_probs=pending.prompt_log_probs,
        num_cached_tokens=pending.num_cached_tokens,
    )
