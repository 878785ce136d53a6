# SPDX-License-Identifier: Apache-2.0
"""Several simulated engines behind a proxy that chooses one for each request: a simulation of discrete events."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightllm_backend.request import Request, SamplingParams, TokenChunk
from perf.chat_traffic import MAX_TOKENS, Turn
from perf.replica_choice import ReplicaChoice
from perf.simulated_engine import MakeRouter, SimulatedEngine, StepSeconds, prompt_ids


@dataclass(slots=True)
class Served:
    """What came of a request. Times are simulated seconds."""

    turn: Turn
    chat: int  # index of its conversation in the traffic
    place: int  # among the turns of its conversation
    replica: int
    arrival: float
    first_token: float = math.nan
    end: float = math.nan
    cached_tokens: int = 0  # of its prompt


class SimulatedReplicas:
    """Engines that serve chats. A turn comes at its time, or when the answer before it has ended if that is later."""

    def __init__(
        self,
        make_router: MakeRouter,
        num_rows: int,
        num_replicas: int,
        choose: ReplicaChoice,
        step_seconds: StepSeconds,
    ) -> None:
        self.engines = [
            SimulatedEngine(make_router, num_rows, self._take, step_seconds, plan_late=True)
            for _ in range(num_replicas)
        ]
        self._choose = choose
        self._loads = [0] * num_replicas  # requests that have not ended
        self._traffic: Sequence[Sequence[Turn]] = ()
        self._arrivals: list[tuple[float, int, int]] = []  # a heap: a turn's time, its conversation and its place
        self._busy: list[tuple[float, int]] = []  # a heap: when an engine has its next turn
        self._served: list[Served] = []

    def fill(self, before: Sequence[Turn]) -> None:
        """Fill the prefix caches with these conversations, in no time at all: none of it is in what `run` returns."""
        step_seconds = self.engines[0].step_seconds
        for engine in self.engines:
            engine.step_seconds = lambda batch, kv_tokens: 0.0
        self.run([[Turn(0.0, turn.conversation, turn.prompt + turn.output, 1)] for turn in before])
        for engine in self.engines:
            engine.step_seconds = step_seconds

    def run(self, traffic: Sequence[Sequence[Turn]], until: float = math.inf) -> list[Served]:
        """The requests in the order of their arrival: when all have ended, or at the time `until`."""
        self._traffic = traffic
        self._served = []
        self._arrivals = [(turns[0].at, chat, 0) for chat, turns in enumerate(traffic)]
        heapq.heapify(self._arrivals)
        while self._arrivals or self._busy:
            if min([at for at, *_ in (*self._arrivals[:1], *self._busy[:1])]) > until:
                break
            if not self._busy or (self._arrivals and self._arrivals[0][0] <= self._busy[0][0]):
                self._submit(*heapq.heappop(self._arrivals))
            else:
                _, replica = heapq.heappop(self._busy)
                self.engines[replica].turn()
                self._await(replica)
        return self._served

    def _submit(self, now: float, chat: int, place: int) -> None:
        turn = self._traffic[chat][place]
        replica = self._choose(str(turn.conversation), self._loads)
        number = len(self._served)
        self._served.append(Served(turn, chat, place, replica, now))
        self._loads[replica] += 1
        engine = self.engines[replica]
        is_idle = math.isinf(engine.turn_at)
        sampling = SamplingParams(max_tokens=MAX_TOKENS, seed=number)
        engine.submit(now, Request(str(number), prompt_ids(turn.conversation, turn.prompt), sampling), turn.output)
        if is_idle:
            self._await(replica)

    def _await(self, replica: int) -> None:
        turn_at = self.engines[replica].turn_at
        if math.isfinite(turn_at):
            heapq.heappush(self._busy, (turn_at, replica))

    def _take(self, now: float, chunk: TokenChunk) -> None:
        served = self._served[int(chunk.uid)]
        if chunk.queue_seconds is not None:
            served.first_token = now
            served.cached_tokens = chunk.num_cached_tokens
        if chunk.finish_reason is not None:
            assert math.isnan(served.end), "a request ends once"
            served.end = now
            self._loads[served.replica] -= 1
            following = self._traffic[served.chat][served.place + 1 : served.place + 2]
            for turn in following:
                heapq.heappush(self._arrivals, (max(turn.at, now), served.chat, served.place + 1))
