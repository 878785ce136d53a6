# SPDX-License-Identifier: Apache-2.0
"""Streams: all requests of one process between the engine and their clients. No torch."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from lightllm_backend.generation.engine_client import EngineClient
from lightllm_backend.generation.send_queue import SendQueue
from lightllm_backend.generation.stream import CHECK_SECONDS, Responder, Stream
from lightllm_backend.generation.token_times import NOBODY, EndedRequest, Identity, Observer
from lightllm_backend.messages.channel import Channel, ChannelClosed, listen
from lightllm_backend.messages.return_messages import ClientGone, DecodingFailed, Delivered, Introduction
from lightllm_backend.messages.seal import Seal
from lightllm_backend.request import FinishReason, Request, RequestError, RequestOptions, TokenChunk
from lightllm_backend.text.text_stream import TextStream

# Limit on checks of all clients together: one takes the detokenizer nearly as long as a response.
MAX_CHECKS_PER_SECOND = 1000.0
# Checks without a pause: chunks wait behind them in the detokenizers.
CHECKS_AT_ONCE = 16
# Limit on the share of its time that the watcher checks. A check waits for the server, so a busy server is asked less.
MAX_CHECKING_SHARE = 0.1
MAX_PAUSE_SECONDS = 1.0  # for the sake of this limit, in each round of checks
ACCEPT_PAUSE_SECONDS = 0.1  # keeps a failure that lasts from filling the log

log = logging.getLogger(__name__)


class _Unobserved:
    """The observer of probes: metrics tell of users' requests alone."""

    def first_token(self, seconds: float, queue_seconds: float) -> None:
        pass

    def next_token(self, seconds: float) -> None:
        pass

    def finished(self, ended: EndedRequest) -> None:
        pass


class Streams:
    """Submits requests, reads the return channel, and cancels the requests of clients that are gone.

    address: where the detokenizer connects the return channel; None in a process without a detokenizer.
    seal: of the Introduction with which each return channel begins.
    """

    def __init__(
        self, engine: EngineClient, observer: Observer, address: str | None = None, seal: Seal | None = None
    ) -> None:
        self._seal = seal
        self.return_address = address or ""
        self._engine = engine
        self._observer = observer
        self._send_queue = SendQueue()
        self._streams: dict[str, Stream] = {}  # by uid, until the last chunk is sent
        self._answers: dict[str, tuple[str, ...]] = {}  # all uids of a request with several answers, by each of them
        self._closing = threading.Event()
        self._listener = listen(address) if address else None
        threading.Thread(target=self._watch_clients, name="watch-clients", daemon=True).start()
        if self._listener:
            threading.Thread(target=self._accept, name="return-channel", daemon=True).start()

    def submit(
        self, prompt_ids: Sequence[int], options: RequestOptions, deadline: float | None,
        responder_for: Callable[[str, int], Responder], flow_control: bool, new_text: Callable[[], TextStream],
        urgent: bool = False, ticket: int = 0, identity: Identity = NOBODY,
    ) -> None:  # fmt: skip
        """Submit a request to the engine. Raises RequestError if it is refused; then no responder is used.

        Each of its answers is a stream of its own. responder_for: makes the responder of the answer with this uid and
        number. new_text: makes an answer's text before its first token, in which stop strings are found. urgent: it is
        a probe, which waits behind no other request and counts in no metric.
        """
        sampling = options.sampling
        observer = _Unobserved() if urgent else self._observer
        request = Request(
            self._engine.new_uid(), tuple(prompt_ids), sampling, deadline, urgent, options.tenant, options.priority,
            ticket,
        )  # fmt: skip
        if not identity.id:
            identity = replace(identity, id=request.uid)
        streams = {
            uid: Stream(
                responder_for(uid, number), options.stream, flow_control, new_text() if sampling.stop_words else None,
                observer, self._send_queue, on_end=partial(self._forget, uid),
                identity=identity,
            )
            for number, uid in enumerate(request.uids)
        }  # fmt: skip

        def on_chunk(chunk: TokenChunk) -> None:
            stream = streams[chunk.uid]
            try:
                if chunk.error is not None and len(streams) > 1:
                    self._lose(chunk.uid)  # the first error ends the response of all
                if stream.on_chunk(chunk):
                    self._engine.stop(chunk.uid)
            except Exception as error:  # it ends this request alone, not the thread that reads all requests' tokens
                log.exception("the tokens of request %s cannot be handled", chunk.uid)
                failure = RequestError("INTERNAL", f"the tokens could not be handled: {error!r}")
                stream.fail(TokenChunk(chunk.uid, [], [], FinishReason.FAILED, len(prompt_ids), error=failure))
                self._cancel(chunk.uid)

        self._streams.update(streams)
        if len(streams) > 1:
            self._answers.update(dict.fromkeys(streams, request.uids))
        try:
            self._engine.submit(request, on_chunk)
        except RequestError:
            for uid in streams:
                self._forget(uid)
            raise

    def _forget(self, uid: str) -> None:
        self._streams.pop(uid, None)
        self._answers.pop(uid, None)

    def _lose(self, uid: str) -> None:
        """Expect no acknowledgement for any answer of the request that this one belongs to."""
        for one in self._answers.get(uid, (uid,)):
            if stream := self._streams.get(one):
                stream.lost()

    def _cancel(self, uid: str) -> None:
        """Cancel all answers of the request that this one belongs to."""
        for one in self._answers.get(uid, (uid,)):
            self._engine.cancel(one)

    def count_open(self) -> int:
        """The number of answers whose last chunk has not been sent."""
        return len(self._streams)

    def close(self) -> None:
        """Send what is pending, acknowledged or not, and stop all threads."""
        self._closing.set()
        for stream in list(self._streams.values()):
            stream.lost()  # nobody will acknowledge what is in flight
        self._send_queue.close()
        if self._listener:
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that is blocked in accept; close() does not
            self._listener.close()

    def _watch_clients(self) -> None:
        """Check each stream's client every CHECK_SECONDS, or less often within the limits."""
        pause, num_checks = CHECK_SECONDS, 0
        due: deque[tuple[str, Stream]] = deque()  # the rest of a round
        while not self._closing.wait(pause):
            self._send_queue.forget_overdue()
            began = time.monotonic()
            if not due:
                due.extend(one for one in list(self._streams.items()) if one[1].last_check <= began - CHECK_SECONDS)
                num_checks = max(len(due), CHECKS_AT_ONCE)
            for _ in range(min(len(due), CHECKS_AT_ONCE)):
                self._check_client(*due.popleft())
            seconds = time.monotonic() - began
            least = CHECKS_AT_ONCE / MAX_CHECKS_PER_SECOND if due else CHECK_SECONDS
            pause = max(least, min(seconds / MAX_CHECKING_SHARE, MAX_PAUSE_SECONDS * CHECKS_AT_ONCE / num_checks))

    def _check_client(self, uid: str, stream: Stream) -> None:
        try:
            if stream.check_client():
                self._cancel(uid)
        except Exception:
            log.exception("the client of request %s cannot be checked", uid)

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
            introduction = channel.receive()
            assert self._seal is not None
            assert isinstance(introduction, Introduction), introduction
            introduction.check(self._seal)
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
                    self._lose(message.uid)
                self._cancel(message.uid)
        except Exception as error:
            channel.close()  # the detokenizer connects anew
            if not isinstance(error, ChannelClosed):
                log.exception("the return channel cannot be read")
