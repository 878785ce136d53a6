# SPDX-License-Identifier: Apache-2.0
"""The way of tokens out of the generation step: coalescing behind one chunk of credit, stop strings, cancellation.

A Stream is one request on its way. It turns what the engine makes, a chunk a step, into what its client can take:

    on_chunk (engine's reader thread) ──> pending ──> send queue, when the stream has credit
    send_pending (send queue's threads)   ──> the response sender
    delivered (return channel)        ──> credit comes back, what is pending goes to the send_queue
    gone (return channel, or the server's is_cancelled) ──> the engine is told to cancel

A request that came through the ensemble has credit for one chunk in flight, without exception: several instances of
the detokenizer take chunks as they come, so it is this that keeps those of a request in order; and each chunk takes
along the state that decoding the one before has come to, which comes back with its credit. Tokens that are made
meanwhile are coalesced into the next chunk; so are those that come while the stream waits in the send queue. Called
directly, there is nobody to give credit back, and none is needed. A request that does not stream keeps everything until
the end. The first chunk and the last go before others.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from lightllm_backend.generation.engine_client import EngineClient
from lightllm_backend.generation.send_queue import SendQueue
from lightllm_backend.messages.channel import Channel, ChannelClosed, listen
from lightllm_backend.messages.return_messages import ClientGone, DecodingFailed, Delivered
from lightllm_backend.request import FinishReason, Request, RequestError, RequestOptions, TokenChunk
from lightllm_backend.text.text_stream import TextStream

# How often is asked whether a stream's client has gone, and how often in all: an answer takes the detokenizer nearly as
# long as a response.
ASK_SECONDS = 0.25
MOST_ASKED_A_SECOND = 1000.0
# Word of a chunk comes in well under a second, unless the whole machine stands still. Where it does not come at all, a
# step has died with the request.
LOST_SECONDS = 60.0
ACCEPT_PAUSE_SECONDS = 0.1

log = logging.getLogger(__name__)


class Responder(Protocol):
    """Where a stream's chunks go: the server's response sender behind a thin adapter."""

    def send(self, chunk: TokenChunk, state: str | None, ask: bool) -> None:
        """Send new tokens; the one with a finish reason is the last call.

        state: a DecodeState as JSON, where decoding has come to; None before the first chunk was delivered.
        ask: have the detokenizer look whether the client has gone.
        """

    def probe(self) -> None:
        """Send something that the client does not see, and ask."""

    def is_cancelled(self) -> bool:
        """Whether the server knows that the client is gone (it does for direct calls only)."""


class Observer(Protocol):
    """Who wants to know when things happen to requests: the metrics."""

    def first_token(self, seconds: float, queue_seconds: float) -> None: ...
    def next_token(self, seconds: float) -> None: ...
    def finished(self, status: str, seconds: float) -> None: ...


class Stream:
    """One request's state between the engine and its client, guarded by its own lock. One chunk is sent at a time."""

    def __init__(
        self,
        responder: Responder,
        streaming: bool,
        flow_control: bool,
        stop_text: TextStream | None,
        observer: Observer,
        send_queue: SendQueue,
        on_end: Callable[[], object] = lambda: None,
    ) -> None:
        self.ended = False
        self.coalesces = False  # see send_queue.Sender
        self.last_asked = time.monotonic()  # whether the client has gone
        self._responder = responder
        self._streaming = streaming
        self._flow_control = flow_control
        self._stop_text = stop_text
        self._observer = observer
        self._send_queue = send_queue
        self._on_end = on_end  # called when the last chunk has been sent
        self._lock = threading.Lock()
        self._pending: TokenChunk | None = None
        self._waits = self._waits_urgently = False  # in the send_queue
        self._in_flight = False
        self._last_sent = 0.0  # when
        self._ask = False  # with the next chunk
        self._state: str | None = None  # of decoding, after what was delivered; only the detokenizer reads it
        self._sent_any = False
        self._num_tokens = 0
        self._started = self._last_token = time.monotonic()

    def on_chunk(self, chunk: TokenChunk) -> bool:
        """Take new tokens, to be sent when there is credit. True if a stop string says that the engine should stop."""
        with self._lock:
            if self._has_last:
                return False
            found_stop = self._cut_at_stop(chunk) if self._stop_text else None
            chunk = found_stop or chunk
            self._observe(chunk)
            self._pending = _join(self._pending, chunk)
            self._offer_pending()
            return found_stop is not None

    def fail(self, last: TokenChunk) -> None:
        """End the request with the error in `last`, if it has not ended yet."""
        with self._lock:
            if not self._has_last:
                self._stop_text = None
                self._observe(last)
                self._pending = _join(self._pending, last)
                self._offer_pending()

    def delivered(self, state: str | None = None) -> None:
        """The chunk in flight has reached the detokenizer's client. A probe leaves no state."""
        with self._lock:
            self._state = self._state if state is None else state
            self._land()

    def lost(self) -> None:
        """The chunk in flight has failed, and the request with it: only its end, for the server, is still sent."""
        with self._lock:
            self._lose()

    def check_client(self) -> bool:
        """True if the client is gone, as far as is known here; else the next chunk asks, or a probe if none is near."""
        with self._lock:
            now = time.monotonic()
            if self.ended:
                return False  # to ask the server after the last chunk crashes it
            if self._in_flight and now > self._last_sent + LOST_SECONDS:
                self._lose()
                return True
            if not self._flow_control and not self._in_flight:
                self.last_asked = now
                return self._responder.is_cancelled()
            if self._in_flight or self._waits or now < self._last_sent + ASK_SECONDS:
                self._ask = True
                return False
            self.last_asked = self._last_sent = now
            self._in_flight = True
            self._send_queue.mark_in_flight(self)
            self._responder.probe()
        return False

    def send_pending(self) -> bool:
        """Called by the send queue. True if a chunk has left of which the return channel will tell."""
        with self._lock:
            self._waits = self._waits_urgently = False
            chunk = self._pending
            if chunk is None or not self._may_send:
                return self._in_flight
            self._pending = None
            if chunk.error is not None and chunk.token_ids:
                # Only the error itself may go with the last chunk, or the ensemble loses the tokens.
                error = replace(chunk, token_ids=[], log_probs=[])
                if self._streaming:
                    chunk, self._pending = replace(chunk, finish_reason=None, error=None), error
                else:
                    chunk = error
            self.ended = chunk.finish_reason is not None
            self.coalesces = len(chunk.token_ids) > 1
            awaits_acknowledgement = self._flow_control and not self.ended
            self._in_flight = self._sent_any = True
            self._last_sent = time.monotonic()
            ask, self._ask = self._ask, False
            if ask:
                self.last_asked = self._last_sent
            state = self._state
        # The engine's reader, who has tokens for all streams, does not wait for the server; others hold back, since
        # the chunk is in flight.
        try:
            self._responder.send(chunk, state, ask)
        finally:
            if self.ended:
                self._on_end()
            if not awaits_acknowledgement:
                self.delivered()
        return awaits_acknowledgement

    @property
    def _has_last(self) -> bool:
        """Whether nothing may follow what is pending or was sent."""
        return self.ended or (self._pending is not None and self._pending.finish_reason is not None)

    @property
    def _may_send(self) -> bool:
        return not self._in_flight and (self._streaming or self._has_last)

    def _lose(self) -> None:
        self._streaming = self._flow_control = False
        self._land()

    def _land(self) -> None:
        self._in_flight = False
        self._send_queue.acknowledged(self)
        self._offer_pending()

    def _offer_pending(self) -> None:
        """Wait in the send queue for what is pending to be sent; the first chunk and the last among the urgent ones."""
        if self._pending is None or not self._may_send:
            return
        urgent = self._has_last or not self._flow_control or not self._sent_any
        if not self._waits or (urgent and not self._waits_urgently):
            self._waits, self._waits_urgently = True, urgent
            self._send_queue.put(self, urgent)

    def _cut_at_stop(self, chunk: TokenChunk) -> TokenChunk | None:
        """The chunk up to the token that completes a stop string, as the last one; None if there is none."""
        text = self._stop_text
        assert text is not None
        before = text.num_tokens
        text.push(chunk.token_ids)
        if not text.stopped or chunk.error is not None:
            return None
        kept = text.num_tokens - before
        return replace(
            chunk, token_ids=chunk.token_ids[:kept], log_probs=chunk.log_probs[:kept], finish_reason=FinishReason.STOP
        )

    def _observe(self, chunk: TokenChunk) -> None:
        now = time.monotonic()
        if chunk.token_ids:
            if self._num_tokens == 0:
                self._observer.first_token(now - self._started, chunk.queue_seconds or 0.0)
            else:
                self._observer.next_token((now - self._last_token) / len(chunk.token_ids))
            self._num_tokens += len(chunk.token_ids)
            self._last_token = now
        if chunk.finish_reason is not None:
            failed = chunk.error is not None and chunk.error.code != "CANCELLED"
            status = "failed" if failed else chunk.finish_reason.value
            self._observer.finished(status, now - self._started)


class Streams:
    """All requests of one process that are on their way: submits them, and watches for clients that have gone.

    With an `address` it also listens for the return channel of the detokenizer there.
    """

    def __init__(self, engine: EngineClient, observer: Observer, address: str | None = None) -> None:
        self.return_address = address or ""
        self._engine = engine
        self._observer = observer
        self._send_queue = SendQueue()
        self._streams: dict[str, Stream] = {}
        self._closing = threading.Event()
        self._listener = listen(address) if address else None
        threading.Thread(target=self._watch_clients, name="watch-clients", daemon=True).start()
        if self._listener:
            threading.Thread(target=self._accept, name="return-channel", daemon=True).start()

    def submit(
        self, prompt_ids: Sequence[int], options: RequestOptions, deadline: float | None,
        responder_for: Callable[[str], Responder], flow_control: bool, text: TextStream, urgent: bool = False,
    ) -> None:  # fmt: skip
        """Send a request on its way. RequestError if it cannot be; then the responder is never used.

        text: in which stop strings are looked for, as it is before the first token.
        """
        sampling = options.sampling
        stop_text = text if sampling.stop_words else None
        uid = self._engine.new_uid()
        stream = Stream(
            responder_for(uid), options.stream, flow_control, stop_text, self._observer, self._send_queue,
            on_end=lambda: self._streams.pop(uid, None),
        )  # fmt: skip

        def on_chunk(chunk: TokenChunk) -> None:
            try:
                if stream.on_chunk(chunk):
                    self._engine.stop(uid)
            except Exception as error:  # it ends this request alone, not the thread that reads all requests' tokens
                log.exception("the tokens of request %s cannot be handled", uid)
                failure = RequestError("INTERNAL", f"the tokens could not be handled: {error!r}")
                stream.fail(TokenChunk(uid, [], [], FinishReason.FAILED, len(prompt_ids), error=failure))
                self._engine.cancel(uid)

        self._streams[uid] = stream
        try:
            self._engine.submit(Request(uid, tuple(prompt_ids), sampling, deadline, urgent), on_chunk)
        except RequestError:
            del self._streams[uid]
            raise

    def close(self) -> None:
        self._closing.set()
        for stream in list(self._streams.values()):
            stream.lost()  # nobody will hear the word of what is in flight
        self._send_queue.close()
        if self._listener:
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits there; closing does not
            self._listener.close()

    def _watch_clients(self) -> None:
        """Look after each stream every ASK_SECONDS, or less often if there are very many."""
        while not self._closing.wait(ASK_SECONDS):
            streams = list(self._streams.items())
            interval = max(ASK_SECONDS, len(streams) / MOST_ASKED_A_SECOND)
            asked_before = time.monotonic() - interval
            for uid, stream in streams:
                try:
                    if stream.last_asked <= asked_before and stream.check_client():
                        self._engine.cancel(uid)
                except Exception:
                    log.exception("whether the client of request %s is there cannot be found out", uid)

    def _accept(self) -> None:
        assert self._listener is not None
        while not self._closing.is_set():
            try:
                channel = Channel.accept(self._listener)
            except OSError as error:
                if not self._closing.is_set():  # for example too many open files, which passes
                    log.error("a detokenizer could not connect: %s", error)
                    self._closing.wait(ACCEPT_PAUSE_SECONDS)
                continue
            threading.Thread(target=self._read_returns, args=(channel,), name="return-channel", daemon=True).start()

    def _read_returns(self, channel: Channel) -> None:
        try:
            while True:
                message = channel.receive()
                assert isinstance(message, Delivered | ClientGone | DecodingFailed), message
                stream = self._streams.get(message.uid)
                if isinstance(message, DecodingFailed):
                    log.error("the detokenizer failed on request %s: %s", message.uid, message.reason)
                if stream is None:
                    continue
                if isinstance(message, Delivered):
                    stream.delivered(message.state)
                    continue
                if isinstance(message, DecodingFailed):
                    stream.lost()
                self._engine.cancel(message.uid)
        except Exception as error:
            channel.close()  # the detokenizer connects anew
            if not isinstance(error, ChannelClosed):
                log.exception("the word of a detokenizer cannot be read")


def _join(pending: TokenChunk | None, chunk: TokenChunk) -> TokenChunk:
    """One chunk instead of two."""
    if pending is None:
        return chunk
    return replace(
        chunk,
        token_ids=pending.token_ids + chunk.token_ids,
        log_probs=pending.log_probs + chunk.log_probs,
        queue_seconds=pending.queue_seconds,
    )
