# SPDX-License-Identifier: Apache-2.0
"""A storm of requests of which many are cancelled, in every state and by every way that exists below Triton server.

    python -m tests.worker.cancellation_storm --requests 10000

Everything is real but the model and the detokenizer: Streams, SendQueue, EngineClient, EngineServer, THE loop, Router.
The command prints what happened, and fails if anything is left.
"""

from __future__ import annotations

import contextlib
import gc
import queue
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil
from numpy.typing import NDArray

from lightllm_backend.generation import stream as stream_module
from lightllm_backend.generation import streams as streams_module
from lightllm_backend.generation.engine_client import EngineClient
from lightllm_backend.generation.streams import Streams
from lightllm_backend.generation.token_times import EndedRequest
from lightllm_backend.messages.return_channel import ReturnChannel
from lightllm_backend.messages.return_messages import ClientGone, Delivered
from lightllm_backend.messages.seal import Purpose, Seal
from lightllm_backend.request import FinishReason, RequestOptions, SamplingParams, TokenChunk
from lightllm_backend.router.admission import Demand
from lightllm_backend.router.batch import Batch
from lightllm_backend.router.past_future import PastFutureAdmission
from lightllm_backend.router.sequence import Sequence, SequenceState
from lightllm_backend.text.text_stream import TextStream
from lightllm_backend.text.tokenizer import Tokenizer
from lightllm_backend.worker.structured_output import StructuredOutput
from tests.polling import poll
from tests.worker.engine_harness import EOS_ID, Answer, CountingEngine

OUTSTANDING = 100  # of Streams; some 25 of them run at once in the pool, the others wait
SEAL = Seal(b"k" * 32, Purpose.RETURNS)
POOL_TOKENS = 400
BATCH_MAX_TOKENS = 16  # a prompt takes up to four steps
MAX_TOKENS = 40
CANCELLED_SHARE = 0.4
CONSTRAINED_SHARE = 0.2  # have structured output
# How a request of Streams ends before its time.
WAYS = ("gone in the ensemble", "gone as a direct caller", "cancel", "deadline", "stop string")
DOOMED_REQUESTS = 10  # of a client that closes its channel, or whose process is killed
STEP_SECONDS = 0.0005
CHECK_SECONDS = 0.005  # of whether a client is gone, as much shorter than in service as the steps are
LIMIT_SECONDS = 30.0

DOOMED_PROCESS = """
import sys, time
from lightllm_backend.generation.engine_client import EngineClient
from lightllm_backend.request import Request, SamplingParams
client = EngineClient(sys.argv[1])
client.wait_ready(10)
for number in range(int(sys.argv[2])):
    client.submit(Request(client.new_uid(), (number,), SamplingParams(max_tokens=40)), lambda chunk: None)
print("submitted", flush=True)
time.sleep(60)
"""


class RecklessAdmission(PastFutureAdmission):
    """Expects everybody to end within a few steps, so that sequences are preempted."""

    def steps_left(self, demand: Demand) -> NDArray[np.int64]:
        return np.minimum(super().steps_left(demand), 5)


class Silent:
    """An Observer that observes nothing."""

    def first_token(self, seconds: float, queue_seconds: float) -> None: ...
    def next_token(self, seconds: float) -> None: ...
    def finished(self, ended: EndedRequest) -> None: ...


class LenientMatcher:
    """A matcher that allows every token."""

    @staticmethod
    def accept_all(_: Any, token_ids: list[int]) -> list[bool]:
        return [False] * len(token_ids)

    def copy(self) -> LenientMatcher:
        return self


class SlowCompiler:
    """Takes a few steps for each text, which it compiles into a LenientMatcher."""

    def cached(self, _: SamplingParams) -> None:
        return None

    def compile(self, _: SamplingParams) -> LenientMatcher:
        time.sleep(random.uniform(0, 20 * STEP_SECONDS))
        return LenientMatcher()


class NoMasks:
    def fill(self, *_: Any) -> None:
        """Masks make no difference to an engine that counts."""


class StormEngine(CountingEngine):
    """Can serve structured output."""

    def structured_output(self) -> StructuredOutput:
        self.structured = StructuredOutput(SlowCompiler(), self.server.wake)  # type: ignore[arg-type]
        self.structured._mask_maker = NoMasks()  # type: ignore[assignment]
        return self.structured


class Client:
    """The Responder of one request, and what is planned for it."""

    def __init__(self, storm: Storm, uid: str, way: str | None, first_token: int, steps: int) -> None:
        self.uid = uid
        self.way = way
        self.first_token = first_token
        self.acts_at = storm.engine.runner.num_launched + steps
        self.gone = False
        self.tokens: list[int] = []
        self.ends: list[FinishReason] = []
        self._storm = storm

    @property
    def in_ensemble(self) -> bool:
        return self.way != "gone as a direct caller"

    def send(self, chunk: TokenChunk, state: bytes | None, check_client: bool) -> None:  # noqa: ARG002, as a Responder's
        self.tokens += chunk.token_ids
        if chunk.finish_reason is not None:
            self.ends.append(chunk.finish_reason)
            self._storm.ended.put(self)
        elif self.in_ensemble:
            self._storm.to_detokenizer.put((self, check_client))

    def probe(self) -> None:
        self._storm.to_detokenizer.put((self, True))

    def is_cancelled(self) -> bool:
        return self.gone


class Storm:
    """Owns the engine and everything between it and the clients."""

    def __init__(self, directory: Path, seed: int) -> None:
        stream_module.CHECK_SECONDS = streams_module.CHECK_SECONDS = CHECK_SECONDS
        self.random = random.Random(seed)
        self._constraints = random.Random(seed)
        self.address = str(directory / "engine")
        settings = {"admission": "past_future", "running_max_req_size": 25, "max_queue_size": 1000}
        self.engine = StormEngine(self.address, 1, POOL_TOKENS, BATCH_MAX_TOKENS, **settings)
        self.engine.router._policy = RecklessAdmission()
        self.engine.runner.step_seconds = STEP_SECONDS
        self.client = EngineClient(self.address)
        self.client.wait_ready(10)
        self.streams = Streams(self.client, Silent(), str(directory / "returns"), SEAL)
        self.tokenizer = Tokenizer.load(Path(__file__).parents[1] / "data" / "byte_level")
        self.ended: queue.Queue[Client] = queue.Queue()
        self.to_detokenizer: queue.Queue[tuple[Client, bool] | None] = queue.Queue()
        self.states: Counter[str] = Counter()  # of sequences and streams, at the time of their cancellation
        self.reasons: Counter[str] = Counter()
        self.ways: Counter[str] = Counter()
        self.most_steps = 0  # from the news of a cancellation to the release of its slots
        self._cancellable: set[str] = set()  # uids of requests that are to end before their time
        self._told_at: dict[str, int] = {}  # by uid: the steps launched when the worker was told
        self._detokenizer = threading.Thread(target=self._detokenize, args=(str(directory / "returns"),))
        self._detokenizer.start()
        self._watch()

    def _watch(self) -> None:
        """Take notes whenever the client tells the worker of an end, and whenever the Router ends a sequence.

        And cancel sequences in the rarer states, which hardly any of the others happens to be in.
        """
        router = self.engine.router
        finish, next_batch, cancel, stop = router.finish, router.next_batch, self.client.cancel, self.client.stop

        def cancelling_next_batch() -> Batch | None:
            batch = next_batch()
            preempted = [one for one in router._queue if one.state is SequenceState.PREEMPTED]
            cut = [router._prefilling] if router._prefilling and self.random.random() < 0.2 else []
            for sequence in preempted + cut:
                if sequence.request.uid in self._cancellable:
                    self._cancellable.remove(sequence.request.uid)
                    self.client.cancel(sequence.request.uid)
            return batch

        def noting_finish(sequence: Sequence, reason: FinishReason, *arguments: Any, **fields: Any) -> None:
            if reason is FinishReason.CANCELLED:
                self.states[sequence.state.value] += 1
                if isinstance(sequence.matcher, LenientMatcher):
                    self.states["constrained"] += 1
            finish(sequence, reason, *arguments, **fields)
            told_at = self._told_at.pop(sequence.request.uid, None)
            if told_at is not None:
                self.most_steps = max(self.most_steps, self.engine.runner.num_launched - told_at)

        def noting(tell: Callable[[str], None]) -> Callable[[str], None]:
            def told(uid: str) -> None:
                stream = self.streams._streams.get(uid)
                if stream is not None:
                    self.states[f"stream {stream._state.value}"] += 1
                tell(uid)
                self._told_at[uid] = self.engine.runner.num_launched

            return told

        router.finish, router.next_batch = noting_finish, cancelling_next_batch  # type: ignore[method-assign]
        self.client.cancel, self.client.stop = noting(cancel), noting(stop)  # type: ignore[method-assign]

    def _detokenize(self, address: str) -> None:
        returns = ReturnChannel(address, SEAL)
        chosen = random.Random(self.random.random())  # a thread's own, so that the others draw what they drew before
        while (work := self.to_detokenizer.get()) is not None:
            client, check = work
            if client.way == "cancel" and chosen.random() < 0.1:
                self.act(client)  # with a chunk in flight, which is seldom so when others act
            if check and client.gone:
                returns.send(ClientGone(client.uid))
            returns.send(Delivered(client.uid, b"state"))

    def run(self, num_requests: int, doomed_every: int, killed_every: int) -> None:
        """So many requests through Streams; every so many of them, a client that closes, or is killed, as well."""
        active: set[Client] = set()
        submitted = 0
        while submitted < num_requests or active:
            if submitted < num_requests and len(active) < OUTSTANDING:
                active.add(self.submit())
                submitted += 1
                if submitted % doomed_every == 0:
                    self.close_a_client()
                if submitted % killed_every == 0:
                    self.kill_a_process()
            else:
                with contextlib.suppress(queue.Empty):
                    active.discard(self._check(self.ended.get(timeout=0.001)))
            with contextlib.suppress(queue.Empty):
                while True:
                    active.discard(self._check(self.ended.get_nowait()))
            for client in active:
                if client.way and self.engine.runner.num_launched >= client.acts_at:
                    self.act(client)

    def submit(self) -> Client:
        chosen = self.random
        way = chosen.choice(WAYS) if chosen.random() < CANCELLED_SHARE else None
        length = chosen.randint(1, 50)
        is_short = chosen.random() < 0.3
        last = EOS_ID - chosen.randint(1, 30) if is_short else chosen.randint(65, 90)  # an EOS, or no end
        stops = (
            (self.tokenizer.decode([last + chosen.randint(1, 30)]),) if way == "stop string" and not is_short else ()
        )
        structured = '{"regex":"a+"}' if self._constraints.random() < CONSTRAINED_SHARE else ""
        sampling = SamplingParams(max_tokens=MAX_TOKENS, stop_words=stops, structured_output=structured)
        # Many have a deadline that does not pass before they end.
        seconds = chosen.uniform(0, 0.2) if way == "deadline" else chosen.choice((None, 600.0))
        deadline = None if seconds is None else time.monotonic() + seconds
        made: list[Client] = []

        def responder_for(uid: str, number: int) -> Client:
            if way is not None:
                self._cancellable.add(uid)
            made.append(Client(self, uid, way, last + 1, chosen.randint(0, 60)))
            return made[0]

        prompt = [chosen.randint(0, 9) for _ in range(length - 1)] + [last]
        options = RequestOptions(sampling, stream=chosen.random() < 0.8)
        text = TextStream(self.tokenizer, stops)
        self.streams.submit(prompt, options, deadline, responder_for, way != "gone as a direct caller", lambda: text)
        return made[0]

    def act(self, client: Client) -> None:
        if client.way in ("gone in the ensemble", "gone as a direct caller"):
            client.gone = True  # Streams finds that
        elif client.way == "cancel":
            self.client.cancel(client.uid)
        client.acts_at = sys.maxsize

    def close_a_client(self) -> None:
        doomed = EngineClient(self.address)
        doomed.wait_ready(10)
        answers = [Answer(doomed, [number], max_tokens=MAX_TOKENS) for number in range(DOOMED_REQUESTS)]
        answers[0].next()
        doomed.close()
        self._note_told([answer.uid for answer in answers])
        for answer in answers:
            answer.wait()  # one end each, which the client itself has made
        self.ways["channel closed"] += DOOMED_REQUESTS

    def kill_a_process(self) -> None:
        command = [sys.executable, "-c", DOOMED_PROCESS, self.address, str(DOOMED_REQUESTS)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as doomed:
            assert doomed.stdout
            assert doomed.stdout.readline() == "submitted\n"
            doomed.kill()
            doomed.wait()
            self._note_told([uid for uid in list(self.engine.server._handles) if uid.startswith(f"{doomed.pid}-")])
        self.ways["process killed"] += DOOMED_REQUESTS

    def _note_told(self, uids: list[str]) -> None:
        told_at = self.engine.runner.num_launched
        for uid in uids:
            if uid in self.engine.router._live:
                self._told_at[uid] = told_at

    def _check(self, client: Client) -> Client:
        """One end each, and the tokens up to it are the right ones."""
        assert len(client.ends) == 1, client.ends
        expected = range(client.first_token, client.first_token + len(client.tokens))
        assert client.tokens == list(expected), client.tokens
        if client.way is None:
            assert client.ends[0] in (FinishReason.STOP, FinishReason.LENGTH), client.ends
        self.reasons[client.ends[0].value] += 1
        self.ways[client.way or "none"] += 1
        return client

    def leftovers(self) -> dict[str, int]:
        """What is left in each table that holds requests, and the token slots that nobody gave back."""
        router, server, stream_queue = self.engine.router, self.engine.server, self.streams._send_queue
        router.check_integrity()
        structured = self.engine.structured
        tables = {
            "Router._live": router._live, "Router._by_arrival_index": router._by_arrival_index,
            "Router._queue": router._queue, "Router._in_flight": router._in_flight, "Router._chunks": router._chunks,
            "Deadlines": router._deadlines, "EngineServer._handles": server._handles,
            "EngineServer._clients but one": list(server._clients)[1:],
            "EngineClient._outstanding": self.client._outstanding, "Streams._streams": self.streams._streams,
            "SendQueue._urgent": stream_queue._urgent, "SendQueue._ready": stream_queue._ready,
            "SendQueue._in_flight": stream_queue._in_flight,
            "StructuredOutput._waiting": structured._waiting, "StructuredOutput._routed": structured._routed,
            "StructuredOutput._ready": structured._ready, "StructuredOutput._done": structured._done,
            "rows": [owner for owner in router._table.owners if owner is not None],
        }  # fmt: skip
        left = {name: len(table) for name, table in tables.items()}
        left["Router._prefilling"] = int(router._prefilling is not None)
        left["token slots"] = router.stats().kv_tokens_used
        return {name: count for name, count in left.items() if count}

    def come_to_rest(self) -> dict[str, int]:
        """Wait until nothing is left anywhere; returns what is left all the same."""
        poll(lambda: not self.engine.router.has_work and not self.engine.router._in_flight, LIMIT_SECONDS)
        poll(lambda: not self.leftovers())
        return self.leftovers()

    def close(self) -> None:
        self.streams.close()
        self.to_detokenizer.put(None)
        self._detokenizer.join()
        self.engine.stop()
        self.client.close()


def resident_bytes() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


@click.command(help=str(__doc__).partition("\n")[0])
@click.option("--requests", default=10_000, show_default=True, type=click.IntRange(min=1000), help="that many")
@click.option("--seed", default=0, show_default=True, type=int, help="of all that is random")
def main(requests: int, seed: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        storm = Storm(Path(directory), seed)
        memory = []
        began = time.monotonic()
        for _ in range(5):
            storm.run(requests // 5, doomed_every=50, killed_every=400)
            left = storm.come_to_rest()
            memory.append(resident_bytes())
            assert not left, left
        seconds = time.monotonic() - began
        preemptions = storm.engine.router.stats().preemptions_total
        storm.close()
    click.echo(f"{sum(storm.ways.values())} requests in {seconds:.0f} s, {preemptions} preemptions; nothing is left")
    for name in ("ways", "reasons", "states"):
        click.echo(f"{name}: " + ", ".join(f"{count} {key}" for key, count in getattr(storm, name).most_common()))
    click.echo(f"slots were free at most {storm.most_steps} steps after the worker was told")
    click.echo("resident MiB after each fifth: " + ", ".join(f"{size / 2**20:.1f}" for size in memory))
    assert storm.most_steps <= 2


if __name__ == "__main__":
    main()
