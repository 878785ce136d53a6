# SPDX-License-Identifier: Apache-2.0
"""A Router in a world of requests that come, go and break off, beside a model of what must hold.

    python -m tests.router.router_world --steps 1000000 --seed 0

This command lives random lives and reports how many steps held. tests/router/test_router_machine.py lets hypothesis
choose what happens instead.

The model knows each request's fate from its own dictionary alone: the tokens that it gets if it is alone in the world,
why it may end, and who of its tenant is before it.
"""

from __future__ import annotations

import random
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import click
import numpy as np

from lightllm_backend.kv_pool.layer_groups import ONE_GROUP, LayerGroups
from lightllm_backend.request import FinishReason, Request, RequestError, SamplingParams
from lightllm_backend.router.admission import AdmissionPolicy, ExactAdmission
from lightllm_backend.router.batch import Batch, RouterOutput, StepResult
from lightllm_backend.router.fair_queue import PRIORITY_SECONDS
from lightllm_backend.router.past_future import PastFutureAdmission
from lightllm_backend.router.router import Router
from lightllm_backend.router.sequence import Sequence
from perf.record import RESULTS, circumstances, write_result
from tests.router.fake_engine import VOCABULARY, FakeRunner, as_chunks, next_token, submit
from tests.router.test_preemption import RecklessAdmission

EOS_IDS = frozenset({4, 9})
TENANTS = ("", "a", "b", "c")
WEIGHTS = {"a": 2.0, "b": 0.5}
POLICIES: dict[str, Callable[[], AdmissionPolicy]] = {
    "exact": ExactAdmission, "past_future": PastFutureAdmission, "reckless": RecklessAdmission,
}  # fmt: skip
# Layers without a window in one group or two, with windows in up to three, and a window that few sequences outgrow.
GROUPS = [ONE_GROUP] * 3 + [LayerGroups(*numbers) for numbers in ((0, 1, 5), (1, 1, 3), (2, 1, 1), (1, 3, 9))]
CLOSED = "the server is stopped"


@dataclass(frozen=True)
class Conditions:
    """What a world is like."""

    capacity: int = 60
    max_running: int = 4
    batch_max_tokens: int = 12
    max_queue_size: int = 6
    depth: int = 1  # steps that are planned before the oldest is applied
    policy: str = "exact"
    prefix_cache: bool | str = True
    tenant_reserve: float = 0.0
    queue_timeout_s: float | None = None
    recompute_at: int | None = None
    groups: LayerGroups = ONE_GROUP  # with a window, the prefix cache is off


@dataclass
class Life:
    """The model's record of one accepted request."""

    request: Request
    arrival: tuple[float, int]  # time and number
    tokens: list[int] = field(default_factory=list)  # that it has received
    may_end: set[FinishReason] = field(default_factory=lambda: {FinishReason.STOP, FinishReason.LENGTH})
    cut: bool = False  # it may end before its answer is complete
    begun: bool = False
    preempted: bool = False  # it goes before those that are not; so does a further answer once the first one runs
    first: Life | None = None  # of a further answer to the same prompt, the first one
    ended: FinishReason | None = None

    @property
    def outside(self) -> bool:
        """Whether it is not in the queue yet."""
        return self.first is not None and not self.first.begun

    def place(self) -> tuple[float, ...]:
        """What the requests of a tenant are ordered by."""
        time_, number = self.arrival
        if self.preempted:
            return 0, number
        return 1, time_ + PRIORITY_SECONDS * self.request.priority, number


class World:
    """The Router, a fake runner and the model."""

    def __init__(self, conditions: Conditions) -> None:
        self.conditions = given = conditions
        self.now = 1000.0
        self.router = Router(
            given.capacity, given.max_running, given.batch_max_tokens, given.max_queue_size, EOS_IDS,
            given.queue_timeout_s, lambda: self.now, POLICIES[given.policy](),
            given.prefix_cache if given.groups.num_windowed == 0 else False, WEIGHTS, given.tenant_reserve,
            given.recompute_at, given.groups,
        )  # fmt: skip
        self.runner = FakeRunner(given.capacity, given.max_running, given.recompute_at, given.groups)
        self.router.on_free(self.runner.spoil)
        self.live: dict[str, Life] = {}
        self.num_accepted = self.num_refused = self.num_ended = self.steps = self.preemptions = 0
        self.num_steps: Counter[str] = Counter()  # by kind
        self.num_step_tokens: Counter[str] = Counter()
        self.most_used = 0
        self.closed = False
        self._in_flight: deque[tuple[Batch, StepResult]] = deque()
        self._written_by: dict[int, str] = {}  # the tenant that wrote a slot last
        self._numbers = 0

    # What happens

    def submit(self, request: Request) -> bool:
        """Submit; whether the Router takes it, which the model foresees."""
        waiting = [life for life in self.live.values() if self._waits(life)]
        full = len(waiting) >= self.conditions.max_queue_size and not request.urgent
        longest = len(request.prompt_ids) + request.sampling.max_tokens - 1
        given = self.conditions
        too_large = given.groups.most_held(longest, given.batch_max_tokens) > given.capacity
        displaced = self._displaced_by(request) if full and not (too_large or self.closed) else None
        if displaced is not None:
            self._may_end(displaced, FinishReason.REJECTED)
        refusal = None
        try:
            submit(self.router, request)
        except RequestError as error:
            refusal = error
        foreseen = self.closed or too_large or (full and displaced is None)
        assert foreseen == (refusal is not None), f"the model and the Router disagree: {refusal}"
        if refusal is not None:
            self.num_refused += 1
            return False
        first = None
        for one in request.copies():
            self._numbers += 1
            life = self.live[one.uid] = Life(one, (self.now, self._numbers), first=first)
            first = first or life
            self.num_accepted += 1
        self.collect()
        assert displaced is None or displaced.ended, "nobody has left the full queue"
        return True

    def step(self) -> None:
        """Plan a step, and apply the oldest one once as many are in flight as may be."""
        self._plan()
        if len(self._in_flight) > self.conditions.depth:
            self._apply()
        else:
            self.collect()

    def cancel(self, uid: str) -> None:
        """All answers to the prompt, as a client does, the first one first."""
        uid = uid.partition("/")[0]
        for one in [one for one in self.live if one.partition("/")[0] == uid]:
            self._end_early(one, self.router.cancel, FinishReason.CANCELLED)

    def stop(self, uid: str) -> None:
        """An answer that a stop string ends has begun, if its prompt has further answers."""
        life = self.live[uid]
        if life.begun or (not any(other.first is life for other in self.live.values()) and not life.outside):
            self._end_early(uid, self.router.stop, FinishReason.STOP)

    def wait(self, seconds: float) -> None:
        """Let time pass; deadlines and the queue's timeout end requests in the next step."""
        self.now += seconds
        timeout = self.conditions.queue_timeout_s
        for life in self.live.values():
            if life.request.deadline is not None and life.request.deadline <= self.now:
                self._may_end(life, FinishReason.CANCELLED)
            if timeout is not None and not life.begun and life.arrival[0] + timeout <= self.now:
                self._may_end(life, FinishReason.FAILED)

    def fail(self) -> None:
        """The step in flight fails on the device."""
        for life in self.live.values():
            self._may_end(life, FinishReason.FAILED)
        self._in_flight.clear()
        self.router.fail_all(RequestError("INTERNAL", "the step failed"))
        self._written_by.clear()
        self.collect()
        assert not self.live, "somebody has survived a failed step"

    def close(self) -> None:
        """The server shuts down."""
        for life in self.live.values():
            self._may_end(life, FinishReason.FAILED)
        self.router.close(RequestError("UNAVAILABLE", CLOSED))
        self.closed = True
        self.collect()
        assert not self.live, "somebody has survived the end"

    def finish(self) -> None:
        """Let all requests come to their end, and look whether anything is left."""
        for _ in range(10_000):
            if not self.router.has_work and not self._in_flight:
                break
            self._plan()
            if self._in_flight:
                self._apply()
        self.collect()
        assert not self.live, f"these never end: {list(self.live)}"
        assert self.num_ended == self.num_accepted
        stats = self.router.stats()
        assert (stats.queued_requests, stats.running_requests, stats.kv_tokens_used) == (0, 0, 0)
        assert (Counter(stats.steps_total), Counter(stats.step_tokens_total)) == (self.num_steps, self.num_step_tokens)
        assert stats.prefix_cache_hits_total <= stats.prefix_cache_queries_total
        ended = self.router.ended_requests
        assert sum(ended.values()) == self.num_accepted + self.num_refused

    # What must hold

    def _plan(self) -> None:
        self.steps += 1
        batch = self.router.next_batch()
        self.collect()  # what a deadline has ended
        stats = self.router.stats()
        used = self.router._pool.capacity - self.router._pool.available
        self.most_used = max(self.most_used, used)
        assert used <= self.conditions.capacity
        assert stats.kv_tokens_used == -(-used // self.conditions.groups.count)
        self._note_preemptions(stats.preemptions_total)
        self.router.check_integrity()
        if batch is not None:
            kind = "decode" if batch.num_decodes == len(batch.rows) else "mixed" if batch.num_decodes else "prefill"
            self.num_steps[kind] += 1
            self.num_step_tokens[kind] += int(batch.lengths.sum())
            assert batch.lengths[batch.num_decodes :].sum() <= self.conditions.batch_max_tokens
            assert len(batch.rows) <= self.conditions.max_running
            self._check_admissions(batch)
            self._in_flight.append((batch, self.runner.step(batch)))
        outside = sum(life.outside for life in self.live.values())  # others join with their first one's admission
        assert stats.queued_requests + stats.running_requests + outside == len(self.live)

    def _check_admissions(self, batch: Batch) -> None:
        owners = self.router._table.owners
        offset = 0
        for row, length in zip(batch.rows.tolist(), batch.lengths.tolist(), strict=True):
            tenant = owners[row].request.tenant
            self._written_by |= dict.fromkeys(batch.slots[:, offset : offset + length].ravel().tolist(), tenant)
            offset += length
        for admission in batch.admitted:
            life = self.live[owners[admission.row].request.uid]
            request = life.request
            life.preempted = life.begun or life.first is not None  # perhaps in this very step
            others = [
                other for other in self.live.values()
                if self._waits(other) and other.request.tenant == request.tenant and not other.request.urgent
            ]  # fmt: skip
            assert request.urgent or all(life.place() <= other.place() for other in others), "somebody is overtaken"
            life.begun, life.preempted = True, False
            for other in self.live.values():
                other.preempted |= other.first is life and not other.begun
            if self.conditions.prefix_cache == "tenant":
                writers = {self._written_by[slot] for slot in admission.cached_slots}
                assert writers <= {request.tenant}, "a tenant finds what another has left"

    def _note_preemptions(self, total: int) -> None:
        if total > self.preemptions:
            assert self.conditions.policy != "exact", "nobody is preempted where admission is exact"
        if total > self.preemptions or self.conditions.recompute_at is not None:
            self.preemptions = total
            for life in self.live.values():
                if not life.outside and (life.begun or life.first):
                    life.preempted = self.router._live[life.request.uid] in self.router._queue

    def _apply(self) -> None:
        batch, result = self._in_flight.popleft()
        self.collect(self.router.apply(batch, result))
        self.router.check_integrity()

    def collect(self, output: RouterOutput | None = None) -> None:
        """Take chunks as clients do: each continues the one answer that there is, and nothing follows an end."""
        for chunk in as_chunks(output) if output else self.router.drain_finished():
            life = self.live[chunk.uid]
            sampling = life.request.sampling
            for token in chunk.token_ids:
                assert token == next_token([*life.request.prompt_ids, *life.tokens]), "a token of somebody else's"
                life.tokens.append(token)
                stops = token in sampling.ending_ids(tuple(EOS_IDS)) and len(life.tokens) > sampling.min_tokens
                is_end = stops or len(life.tokens) == sampling.max_tokens
                natural = FinishReason.STOP if stops else FinishReason.LENGTH
                assert (chunk.finish_reason is natural) if is_end else (not chunk.finish_reason), "the wrong end"
            if chunk.finish_reason is not None:
                assert chunk.finish_reason in life.may_end, f"{chunk.finish_reason} for no reason"
                assert chunk.token_ids or life.cut, "an end before the answer is complete"
                life.ended = chunk.finish_reason
                del self.live[chunk.uid]
                self.num_ended += 1

    def _waits(self, life: Life) -> bool:
        return not life.outside and (life.preempted or not life.begun)

    def _displaced_by(self, request: Request) -> Life | None:
        """Brute force: the last of the tenant with most waiting requests by weight, if the newcomer's has fewer."""
        queues: dict[str, list[Life]] = {request.tenant: []}
        for life in self.live.values():
            if not life.begun and not life.first and not life.request.urgent:
                queues.setdefault(life.request.tenant, []).append(life)
        lengths = {tenant: len(queue) / WEIGHTS.get(tenant, 1.0) for tenant, queue in queues.items()}
        own = (len(queues[request.tenant]) + 1) / WEIGHTS.get(request.tenant, 1.0)
        longest = [tenant for tenant in queues if lengths[tenant] == max(lengths.values())]
        if own >= max(lengths.values()):
            return None
        # Among equals any may be chosen: the one that the Router has chosen is known by its end.
        lasts = [max(queues[tenant], key=Life.place) for tenant in longest]
        chosen = self.router._queue.displaced_by(Sequence(request, 0, 0, self.now, np.zeros(1)))
        [displaced] = [life for life in lasts if chosen is not None and chosen.request.uid == life.request.uid]
        return displaced

    def _end_early(self, uid: str, end: Callable[[str], None], reason: FinishReason) -> None:
        life = self.live.get(uid)
        if life is not None:
            self._may_end(life, reason)
        end(uid)
        self.collect()
        assert life is None or life.ended is reason, "it has not ended"
        self.router.check_integrity()

    def _may_end(self, life: Life, reason: FinishReason) -> None:
        for one in (life, *(other for other in self.live.values() if other.first is life and other.outside)):
            one.cut = True
            one.may_end.add(reason)


# Random lives


def random_conditions(rng: random.Random) -> Conditions:
    return Conditions(
        capacity=rng.randint(36, 120),
        max_running=rng.randint(1, 6),
        batch_max_tokens=rng.randint(1, 30),
        max_queue_size=rng.randint(1, 12),
        depth=rng.randint(0, 2),
        policy=rng.choice(list(POLICIES)),
        prefix_cache=rng.choice([False, True, "tenant"]),
        tenant_reserve=rng.choice([0.0, 0.3]),
        queue_timeout_s=rng.choice([None, 30.0]),
        recompute_at=rng.choice([None, None, rng.randint(2, 20)]),
        groups=rng.choice(GROUPS),
    )


def make_request(
    number: int, family: int, prompt_length: int, max_tokens: int, tenant: str, priority: int = 0,
    deadline: float | None = None, urgent: bool = False, **sampling: object,
) -> Request:  # fmt: skip
    """Within a family, one prompt begins with another; the handle in outputs holds a uid of at most seven bytes."""
    prompt = tuple((family + position * position) % VOCABULARY for position in range(prompt_length))
    params = SamplingParams(max_tokens=max_tokens, **sampling)  # type: ignore[arg-type]
    return Request(f"{number:x}", prompt, params, deadline, urgent, tenant, priority)


def live_one_moment(world: World, rng: random.Random, number: int) -> None:
    """Something random happens, and then a step."""
    if rng.random() < 0.4:
        urgent = rng.random() < 0.03
        world.submit(
            make_request(
                number,
                rng.randrange(3),
                rng.randint(1, 25),
                rng.randint(1, 12),
                rng.choice(TENANTS),
                rng.choice([0, 0, 0, -3, 5]),
                world.now + rng.uniform(1, 60) if rng.random() < 0.1 else None,
                urgent,
                min_tokens=rng.choice([0, 0, 3]),
                ignore_eos=rng.random() < 0.2,
                return_log_probs=rng.random() < 0.2,
                n=rng.choice([1, 1, 1, 2, 4]),
            )
        )
    if world.live and rng.random() < 0.06:
        rng.choice([world.cancel, world.stop])(rng.choice(list(world.live)))
    if rng.random() < 0.05:
        world.wait(rng.uniform(0, 20))
    if rng.random() < 0.001:
        world.fail()
    world.step()


@click.command(help="Live random lives until so many steps have been planned.")
@click.option("--steps", default=1_000_000, show_default=True, type=click.IntRange(min=1))
@click.option("--seed", default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "router_world.json", help="the JSON file")
def main(steps: int, seed: int, out: Path) -> None:
    began, rng = time.monotonic(), random.Random(seed)
    totals = dict.fromkeys(["worlds", "steps", "requests", "preemptions", "exact_worlds", "exact_worlds_filled"], 0)
    while totals["steps"] < steps:
        world = World(random_conditions(rng))
        for number in range(min(2000, steps - totals["steps"])):
            live_one_moment(world, rng, number)
        if rng.random() < 0.5:
            world.close()
        world.finish()
        totals["worlds"] += 1
        totals["steps"] += world.steps
        totals["requests"] += world.num_accepted
        totals["preemptions"] += world.preemptions
        exact = world.conditions.policy == "exact"
        totals["exact_worlds"] += exact
        totals["exact_worlds_filled"] += exact and world.most_used == world.conditions.capacity
    seconds = time.monotonic() - began
    click.echo(f"{totals}, {totals['steps'] / seconds:.0f} steps a second, no broken invariant")
    write_result(out, {"benchmark": "router_world", "seed": seed, **circumstances(None), **totals, "seconds": seconds})


if __name__ == "__main__":
    main()
