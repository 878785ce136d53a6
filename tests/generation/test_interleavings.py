# SPDX-License-Identifier: Apache-2.0
"""Every order in which the messages about two streams can arrive, explored to the end with the real Stream.

Real: Stream and SendQueue, without threads. Scripted: the worker and the engine client's table of requests, the two
detokenizers with the return channel, the clients, and a clock. An action is whatever one of these processes may do
next. From each state every action is tried, and a state that was seen before is not explored again, so the search
covers all interleavings. It is finite, since the scripts are.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from lightllm_backend.generation import send_queue as send_queue_module
from lightllm_backend.generation import stream as stream_module
from lightllm_backend.generation.send_queue import SendQueue
from lightllm_backend.generation.stream import ACKNOWLEDGEMENT_SECONDS, CHECK_SECONDS, Stream
from lightllm_backend.generation.token_times import EndedRequest
from lightllm_backend.request import FinishReason, RequestError, TokenChunk

STOP_TOKEN = 9  # completes the stop string of a stream that has one
PROBE, END_OF_FILE = "probe", "end of file"


class Faults(NamedTuple):
    """What may go wrong in an exploration, each at any moment and at most so often."""

    leave: int = 0  # a client goes away
    watch: int = 0  # the watcher looks at a stream
    late: int = 0  # the watcher gives an acknowledgement up that may still come
    die: int = 0  # the worker dies; another starts
    decoding_fails: int = 0  # the detokenizer reports that it could not decode a chunk
    crash: int = 0  # a detokenizer crashes with a chunk in its hands


class Script(NamedTuple):
    """The tokens of one stream, one a step, and what the engine says with the last one."""

    tokens: tuple[int, ...]
    has_stop_string: bool = False
    late: bool = False  # it is submitted later: at any moment

    @property
    def answer(self) -> tuple[int, ...]:
        """What its client gets if nothing goes wrong."""
        if not self.has_stop_string:
            return self.tokens
        return self.tokens[: self.tokens.index(STOP_TOKEN) + 1]


class StopText:
    """A TextStream as far as Stream uses it."""

    def __init__(self) -> None:
        self.num_tokens, self.stopped = 0, False

    def push(self, token_ids: list[int]) -> None:
        for token in token_ids:
            if not self.stopped:
                self.num_tokens += 1
                self.stopped = token == STOP_TOKEN


class SilentObserver:
    def first_token(self, seconds: float, queue_seconds: float) -> None: ...
    def next_token(self, seconds: float) -> None: ...
    def finished(self, ended: EndedRequest) -> None: ...


class State(NamedTuple):
    """All that the processes know and all that is on its way, as immutable values."""

    streams: tuple[tuple[Any, ...], ...]
    stop_texts: tuple[tuple[int, bool], ...]
    urgent: tuple[int, ...]
    ready: tuple[int, ...]
    in_flight: frozenset[int]
    clock: float
    submitted: frozenset[int]
    outstanding: frozenset[int]  # the engine client's table
    connected: bool
    alive: bool  # the worker
    made: tuple[int, ...]  # tokens that the worker has made
    running: frozenset[int]  # in the worker
    to_worker: tuple[tuple[str, int], ...]
    from_worker: tuple[Any, ...]
    to_detokenizer: tuple[tuple[Any, ...], ...]
    returns: tuple[tuple[Any, ...], ...]
    received: tuple[tuple[int, ...], ...]  # by clients
    ends: tuple[int, ...]  # last chunks sent
    told: tuple[bool, ...]  # the client has had its end: a last response, or an error
    gone: frozenset[int]  # clients
    cancelled: frozenset[int]
    lost: frozenset[int]  # streams whose chunk in flight has failed
    crashed: frozenset[int]  # the chunk in flight is lost for good
    failed: frozenset[int]  # a chunk could not be decoded, which the client was told
    left: Faults  # that may still happen


# What of a Stream changes.
FIELDS = (
    "coalesces", "last_check", "_delivery", "_stop_text", "_state", "_pending", "_decode_state", "_sent_any",
    "_sent_at", "_check_with_next",
)  # fmt: skip


class Universe:
    """The real objects, whose state is set before and read after each action."""

    def __init__(self, scripts: tuple[Script, ...], faults: Faults, clock: SimpleNamespace) -> None:
        self.scripts, self.faults, self.clock = scripts, faults, clock
        self.queue = SendQueue(num_threads=0)
        self.stop_texts = [StopText() for _ in scripts]
        self.streams: list[Stream] = []
        for number, script in enumerate(scripts):
            text: Any = self.stop_texts[number] if script.has_stop_string else None
            self.streams.append(Stream(self.responder(number), True, True, text, SilentObserver(), self.queue))
        self.number_of = {id(stream): number for number, stream in enumerate(self.streams)}
        self.initial_fields = [tuple(getattr(stream, name) for name in FIELDS) for stream in self.streams]
        self.now: dict[str, Any] = {}  # the State's other fields, while an action runs

    def responder(self, number: int) -> Any:
        def send(chunk: TokenChunk, state: str | None, check_client: bool) -> None:
            assert self.now["ends"][number] == 0, "something after the end"
            is_last = chunk.finish_reason is not None
            if number in self.now["lost"]:
                assert is_last, "more than the end after a chunk was lost"
            else:
                assert self.unacknowledged(number) == 0, "two chunks in flight"
            if is_last and self.stop_texts[number].stopped:
                assert chunk.finish_reason is FinishReason.STOP, "another end than the one that was found"
            assert chunk.token_ids or is_last, "an empty chunk"
            self.now["ends"][number] += is_last
            self.now["to_detokenizer"][number].append(
                (tuple(chunk.token_ids), is_last, chunk.error is not None, state, check_client)
            )

        def probe() -> None:
            assert self.now["ends"][number] == 0, "a question after the end"
            assert self.unacknowledged(number) == 0, "a probe beside a chunk in flight"
            self.now["to_detokenizer"][number].append(PROBE)

        return SimpleNamespace(send=send, probe=probe, is_cancelled=lambda: False)

    def unacknowledged(self, number: int) -> int:
        delivered = [message for message in self.now["returns"][number] if message[0] == "delivered"]
        return len(self.now["to_detokenizer"][number]) + len(delivered)

    def initial(self) -> State:
        numbers = range(len(self.scripts))
        there = frozenset(number for number in numbers if not self.scripts[number].late)
        none: tuple[tuple[Any, ...], ...] = tuple(() for _ in numbers)
        return State(
            tuple(self.initial_fields), tuple((0, False) for _ in numbers), (), (), frozenset(), 1000.0, there, there,
            True, True, tuple(0 for _ in numbers), there, (), (), none, none, none, tuple(0 for _ in numbers),
            tuple(False for _ in numbers), frozenset(), frozenset(), frozenset(), frozenset(), frozenset(),
            self.faults,
        )  # fmt: skip

    def load(self, state: State) -> None:
        for stream, values in zip(self.streams, state.streams, strict=True):
            stream.__dict__.update(zip(FIELDS, values, strict=True))
        for text, (num_tokens, stopped) in zip(self.stop_texts, state.stop_texts, strict=True):
            text.num_tokens, text.stopped = num_tokens, stopped
        self.queue._urgent = deque(self.streams[number] for number in state.urgent)
        self.queue._ready = deque(self.streams[number] for number in state.ready)
        self.queue._in_flight = dict.fromkeys((self.streams[number] for number in state.in_flight), 0.0)
        self.clock.now = state.clock
        self.now = {
            name: list(map(list, value)) if name in ("to_detokenizer", "returns", "received")
            else list(value) if isinstance(value, tuple) and not isinstance(value, Faults)
            else set(value) if isinstance(value, frozenset)
            else value
            for name, value in state._asdict().items()
        }  # fmt: skip

    def save(self) -> State:
        now = dict(self.now)
        now["streams"] = tuple(tuple(getattr(stream, name) for name in FIELDS) for stream in self.streams)
        now["stop_texts"] = tuple((text.num_tokens, text.stopped) for text in self.stop_texts)
        now["urgent"] = tuple(self.number_of[id(stream)] for stream in self.queue._urgent)
        now["ready"] = tuple(self.number_of[id(stream)] for stream in self.queue._ready)
        now["in_flight"] = frozenset(self.number_of[id(stream)] for stream in self.queue._in_flight)
        now["clock"] = self.clock.now
        for name, value in now.items():
            if name in ("to_detokenizer", "returns", "received"):
                now[name] = tuple(map(tuple, value))
            elif isinstance(value, list):
                now[name] = tuple(value)
            elif isinstance(value, set):
                now[name] = frozenset(value)
        return State(**now)

    # The actions of each process

    def actions(self, state: State) -> Iterator[Callable[[], None]]:
        """What may happen next of itself: if there is nothing, all must have come to its end."""
        for number in sorted(state.running):
            yield lambda number=number: self.make(number)
        if state.alive and state.to_worker:
            yield self.worker_reads
        if state.from_worker:
            yield self.client_reads
        if state.urgent or (state.ready and len(state.in_flight) < send_queue_module.MAX_IN_FLIGHT):
            yield self.send_next
        for number in range(len(self.scripts)):
            if state.to_detokenizer[number] and number not in state.crashed:
                yield lambda number=number: self.decode(number)
            if state.returns[number]:
                yield lambda number=number: self.acknowledge(number)
            if number in state.crashed and self.streams_awaits(state, number):
                yield lambda number=number: self.watch(number, ACKNOWLEDGEMENT_SECONDS + 1)
        if not state.connected and END_OF_FILE not in state.from_worker and not state.alive:
            yield self.restart
        for number, script in enumerate(self.scripts):
            if script.late and number not in state.submitted:
                yield lambda number=number: self.submit(number)

    def faults_of(self, state: State) -> Iterator[Callable[[], None]]:
        """What may happen besides."""
        left = state.left
        if left.die and state.alive and state.connected:
            yield lambda: self.die(loses=False)
            yield lambda: self.die(loses=True)
        for number in sorted(state.submitted):
            if left.leave and number not in state.gone:
                yield lambda number=number: self.leave(number)
            if left.watch:
                yield lambda number=number: self.watch(number, CHECK_SECONDS, "watch")
            if left.late:
                yield lambda number=number: self.watch(number, ACKNOWLEDGEMENT_SECONDS + 1, "late")
            if left.decoding_fails and state.to_detokenizer[number][:1] not in ((), (PROBE,)):
                yield lambda number=number: self.decode(number, fails=True)
            if left.crash and state.to_detokenizer[number] and number not in state.crashed:
                yield lambda number=number: self.crash(number)

    def use_up(self, fault: str) -> None:
        left = self.now["left"]
        self.now["left"] = left._replace(**{fault: getattr(left, fault) - 1})

    def submit(self, number: int) -> None:
        self.now["submitted"].add(number)
        if self.now["connected"]:
            self.now["outstanding"].add(number)
            if self.now["alive"]:
                self.now["running"].add(number)
        else:  # refused; the stream is never used
            self.now["ends"][number], self.now["told"][number] = 1, True

    def make(self, number: int) -> None:
        """The worker samples a token."""
        script, made = self.scripts[number], self.now["made"][number]
        is_last = made + 1 == len(script.tokens)
        self.now["made"][number] += 1
        self.now["from_worker"].append((number, script.tokens[made], "length" if is_last else None))
        if is_last:
            self.now["running"].discard(number)

    def worker_reads(self) -> None:
        what, number = self.now["to_worker"].pop(0)
        if number in self.now["running"]:
            self.now["running"].discard(number)
            self.now["from_worker"].append((number, None, "cancelled" if what == "cancel" else "stop"))

    def client_reads(self) -> None:
        """The engine client's reader, as EngineClient._deliver and _lose_worker do."""
        message = self.now["from_worker"].pop(0)
        if message == END_OF_FILE:
            self.now["connected"] = False
            lost = sorted(self.now["outstanding"])
            self.now["outstanding"].clear()
            for number in lost:
                error = RequestError("UNAVAILABLE", "the engine stopped")
                self.on_chunk(number, TokenChunk(str(number), [], [], FinishReason.FAILED, error=error))
            return
        number, token, reason = message
        if number in self.now["outstanding"]:
            if reason is not None:
                self.now["outstanding"].discard(number)
            tokens = [] if token is None else [token]
            self.on_chunk(number, TokenChunk(str(number), tokens, [], FinishReason(reason) if reason else None))

    def on_chunk(self, number: int, chunk: TokenChunk) -> None:
        if self.streams[number].on_chunk(chunk):
            self.tell_worker("stop", number)

    def tell_worker(self, what: str, number: int) -> None:
        if self.now["connected"] and self.now["alive"]:
            self.now["to_worker"].append((what, number))

    def cancel(self, number: int) -> None:
        self.now["cancelled"].add(number)
        self.tell_worker("cancel", number)

    def send_next(self) -> None:
        self.queue.send_next()

    def decode(self, number: int, fails: bool = False) -> None:
        """Either detokenizer: as model.py of the detokenizer does."""
        message = self.now["to_detokenizer"][number].pop(0)
        returns = self.now["returns"][number]
        if message == PROBE:
            if number in self.now["gone"]:
                returns.append(("gone",))
            returns.append(("delivered", None))
            return
        tokens, is_last, is_error, state, check = message
        if check and number in self.now["gone"]:
            returns.append(("gone",))
        if fails:
            self.use_up("decoding_fails")
            self.now["failed"].add(number)
            self.now["told"][number] = True
            returns.append(("failed",))
            return
        received = self.now["received"][number]
        if not self.now["told"][number]:
            if number not in self.now["lost"]:
                assert int(state or 0) == len(received), "decoding goes on from another place"
            received.extend(tokens)
        if is_last or is_error:
            self.now["told"][number] = True
        else:
            returns.append(("delivered", str(len(received))))

    def acknowledge(self, number: int) -> None:
        """Generation reads the return channel, as Streams._read_returns does."""
        what, *state = self.now["returns"][number].pop(0)
        stream = self.streams[number]
        if self.now["ends"][number]:
            return  # Streams has forgotten it
        if what == "delivered":
            stream.delivered(state[0])
            return
        if what == "failed":
            self.now["lost"].add(number)
            stream.lost()
        self.cancel(number)

    def watch(self, number: int, seconds: float, fault: str | None = None) -> None:
        """The watcher's look at a stream that has not ended, after some time."""
        if fault:
            self.use_up(fault)
        self.clock.now += seconds
        if not self.now["ends"][number] and self.streams[number].check_client():
            self.now["lost"].add(number)
            self.cancel(number)

    def streams_awaits(self, state: State, number: int) -> bool:
        return not state.ends[number] and number not in state.lost

    def crash(self, number: int) -> None:
        self.use_up("crash")
        self.now["to_detokenizer"][number].clear()
        self.now["crashed"].add(number)
        self.now["told"][number] = True  # whatever Triton server makes of it, nothing more comes

    def leave(self, number: int) -> None:
        self.use_up("leave")
        self.now["gone"].add(number)

    def die(self, loses: bool) -> None:
        """The worker dies; what it has sent may still be read, or not."""
        self.use_up("die")
        self.now["alive"] = False
        self.now["running"].clear()
        self.now["to_worker"].clear()
        self.now["from_worker"] = [*([] if loses else self.now["from_worker"]), END_OF_FILE]

    def restart(self) -> None:
        self.now["alive"] = self.now["connected"] = True

    # What must hold

    def check(self, state: State) -> None:
        for number, script in enumerate(self.scripts):
            received = state.received[number]
            assert received == script.answer[: len(received)], "a token twice, missing, or after the end"
            assert state.ends[number] <= 1, "two ends"

    def check_end(self, state: State) -> None:
        """Nothing more happens of itself."""
        assert not state.outstanding, "the engine client still waits"
        assert len(state.urgent) + len(state.ready) == 0, "something was never sent"
        for number, script in enumerate(self.scripts):
            assert state.ends[number] == 1, f"stream {number} has no end"
            broken_off = state.cancelled | state.lost | state.crashed | state.failed
            disturbed = number in broken_off or state.left.die < self.faults.die
            assert disturbed or state.received[number] == script.answer, "an answer is incomplete"
        assert not state.in_flight, "an acknowledgement is waited for"


def key(universe: Universe, state: State) -> Hashable:
    """The state without what makes no difference: of times, only whether a limit has passed."""
    streams = []
    for values in state.streams:
        fields = dict(zip(FIELDS, values, strict=True))
        age = state.clock - fields.pop("_sent_at")
        fields.pop("last_check"), fields.pop("coalesces"), fields.pop("_stop_text")
        pending = fields.pop("_pending")
        pending = pending and (tuple(pending.token_ids), pending.finish_reason, pending.error is not None)
        streams.append((*fields.values(), pending, age >= CHECK_SECONDS, age > ACKNOWLEDGEMENT_SECONDS))
    return (*streams, *state[1:5], *state[6:])


def explore(scripts: tuple[Script, ...], faults: Faults, clock: SimpleNamespace) -> Counter[str]:
    """Visit every state that can be reached; count states, transitions and ends."""
    universe, counts = Universe(scripts, faults, clock), Counter[str]()
    initial = universe.initial()
    seen, waiting = {key(universe, initial)}, [initial]
    while waiting:
        state = waiting.pop()
        counts["states"] += 1
        universe.check(state)
        actions = list(universe.actions(state))
        if not actions:
            counts["ends"] += 1
            universe.check_end(state)
        for action in [*actions, *universe.faults_of(state)]:
            universe.load(state)
            action()
            counts["transitions"] += 1
            following = universe.save()
            if (known := key(universe, following)) not in seen:
                seen.add(known)
                waiting.append(following)
    return counts


TWO = (Script((1, 2, 3)), Script((4, 5), late=True))
SHORT = (Script((1, 2)), Script((4,), late=True))
STOPPING = (Script((1,)), Script((4, STOP_TOKEN, 6), has_stop_string=True))
CASES = {
    "undisturbed": (TWO, Faults()),
    "stop strings": (STOPPING, Faults()),
    "a client leaves": (SHORT, Faults(leave=1, watch=1)),
    "the worker dies": (SHORT, Faults(die=1)),
    "the worker dies as the stop string comes": (STOPPING, Faults(die=1)),
    "decoding fails": (TWO, Faults(decoding_fails=1)),
    "a detokenizer crashes": (SHORT, Faults(crash=1)),
    "an acknowledgement is late": (SHORT, Faults(late=1)),
}
# ALL_INTERLEAVINGS=1 explores these too: 338,000 states in all, in a minute.
LONG_CASES = {
    "a client leaves and the worker dies": (SHORT, Faults(leave=1, watch=1, die=1)),
    "a client leaves as the stop string comes": (STOPPING, Faults(leave=1, watch=1)),
    "longer streams, and a client leaves": (TWO, Faults(leave=1, watch=1)),
    "longer streams, and the worker dies as decoding fails": (TWO, Faults(die=1, decoding_fails=1)),
    "a client leaves and decoding fails": (SHORT, Faults(leave=1, watch=1, decoding_fails=1)),
    "the worker dies and a detokenizer crashes": (SHORT, Faults(die=1, crash=1)),
    "the worker dies and an acknowledgement is late": (SHORT, Faults(die=1, late=1)),
}
if os.environ.get("ALL_INTERLEAVINGS"):
    CASES |= LONG_CASES


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("in_flight", [1, 2])
def test_every_interleaving_of_two_streams(case: str, in_flight: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """in_flight: how many chunks the send queue lets go at once, so that streams wait for each other or do not."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(stream_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(send_queue_module, "MAX_IN_FLIGHT", in_flight)
    counts = explore(*CASES[case], clock)
    print(f"{case}, {in_flight} in flight: {counts['states']} states, {counts['transitions']} transitions")
    assert counts["ends"] > 0
