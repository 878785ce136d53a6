# SPDX-License-Identifier: Apache-2.0
"""FairQueue: the requests that wait for admission, in one queue for each tenant, and whose turn it is.

Tenants share the engine by deficit round robin (Shreedhar and Varghese, SIGCOMM 1995) over prompt and output tokens.
The round robin itself must know what a request costs before it is served, and the length of an answer is unknown. So
this is its form for language models, the virtual token counter (Sheng et al., OSDI 2024): each tenant has a counter of
the tokens that were computed for it, divided by its weight, and the waiting tenant with the lowest counter is next. A
token is charged when a step computes it, so a tenant also pays for long answers and for what is already running.

A tenant that begins to wait is lifted to the lowest counter of those that wait already: nobody saves up idle time. If
nobody waits, nobody is owed anything, and it begins at the highest counter. New tenants without end must not starve an
old one, so there is a floor that they begin at, which rises with all that waiting tenants receive (the virtual time of
weighted fair queueing). With a single tenant no counter matters, and none is kept.

Within a tenant, requests go in order of arrival. One level of priority counts as PRIORITY_SECONDS of waiting, so that
an unimportant request ages past important ones that come later, and none starves.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from lightllm_backend.router.sequence import Sequence, SequenceState

# How much earlier a request counts as having come for each level of priority. The longest answers take about as long.
PRIORITY_SECONDS = 10.0
# Tenants without requests are forgotten once there are twice those that were kept last time, and this many more.
MAX_IDLE_TENANTS = 64


@dataclass(eq=False, slots=True)
class Tenant:
    """One tenant's waiting requests, and the service that it has received."""

    weight: float
    service: float = 0.0  # the counter: tokens computed, divided by the weight
    num_running: int = 0  # sequences with a row of the request table
    num_queued: int = 0  # waiting sequences that have not begun
    has_entry: bool = False  # in FairQueue's heap
    preempted: dict[str, Sequence] = field(default_factory=dict)  # by uid; they go before all others
    levels: dict[int, OrderedDict[str, Sequence]] = field(default_factory=dict)  # by priority, in order of arrival

    @property
    def waits(self) -> bool:
        return bool(self.levels or self.preempted)

    def first(self) -> Sequence:
        """The waiting sequence that goes first."""
        if self.preempted:
            return min(self.preempted.values(), key=lambda sequence: sequence.arrival_index)
        return min((next(iter(level.values())) for level in self.levels.values()), key=_place)

    def last_queued(self) -> Sequence:
        """The sequence that goes last among those that have not begun."""
        return max((next(reversed(level.values())) for level in self.levels.values()), key=_place)


class FairQueue:
    """Owns who waits, and what each tenant has received. Urgent requests go before those of all tenants."""

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        """weights: by tenant; all others have weight 1."""
        self._weights = weights or {}
        self._waiting: OrderedDict[str, Sequence] = OrderedDict()  # by uid, in order of arrival; preempted ones first
        self._urgent: OrderedDict[str, Sequence] = OrderedDict()  # by uid, the latest first
        self._tenants: dict[str, Tenant] = {}
        self._running: dict[str, Tenant] = {}  # those with num_running > 0
        # A heap of the tenants that wait: counter, number of the entry, tenant. Counters only grow, so an entry that is
        # out of date stands too far in front, where `_lowest` finds and corrects it.
        self._line: list[tuple[float, int, Tenant]] = []
        self._entries = itertools.count()
        self._highest = 0.0  # of all counters
        self._floor = 0.0  # the mean of the counters of those that wait, if all began together
        self._waiting_weight = 0.0  # of the tenants that wait, together
        self._max_tenants = MAX_IDLE_TENANTS

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence.request.uid in self._waiting

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._waiting.values())

    # Waiting requests

    def add(self, sequence: Sequence) -> None:
        """Add a new request."""
        request = sequence.request
        if request.urgent:
            self._add_urgent(sequence)
            return
        tenant = self._line_up(request.tenant)
        level = tenant.levels.get(request.priority)
        if level is None:
            level = tenant.levels[request.priority] = OrderedDict()
        level[request.uid] = self._waiting[request.uid] = sequence
        tenant.num_queued += 1

    def put_back(self, sequence: Sequence) -> None:
        """Add a preempted sequence, before all others of its tenant."""
        request = sequence.request
        if request.urgent:
            self._add_urgent(sequence)
            return
        self._line_up(request.tenant).preempted[request.uid] = self._waiting[request.uid] = sequence
        self._waiting.move_to_end(request.uid, last=False)

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence; it need not wait."""
        request = sequence.request
        if self._waiting.pop(request.uid, None) is None or self._urgent.pop(request.uid, None) is not None:
            return
        tenant = self._tenants[request.tenant]
        if tenant.preempted.pop(request.uid, None) is None:
            level = tenant.levels[request.priority]
            del level[request.uid]
            if not level:
                del tenant.levels[request.priority]
            tenant.num_queued -= 1
        if not tenant.waits:
            self._waiting_weight -= tenant.weight

    def next(self) -> Sequence | None:
        """The sequence whose turn it is; None if nobody waits."""
        if self._urgent:
            return next(iter(self._urgent.values()))
        tenant = self._lowest()
        return tenant.first() if tenant else None

    def displaced_by(self, sequence: Sequence) -> Sequence | None:
        """The request that must leave a full queue for a new one; None: the new one has to go.

        It is the last one of the tenant with the longest queue, if the new one's tenant then has a shorter queue still.
        Lengths count in proportion to the weights.
        """
        longest = self._tenants.get(self.longest())
        if longest is None or not longest.levels:
            return None
        name = sequence.request.tenant
        own = self._tenants.get(name) or Tenant(self._weight(name))
        is_shorter = (own.num_queued + 1) / own.weight < longest.num_queued / longest.weight
        return longest.last_queued() if is_shorter else None

    def longest(self) -> str:
        """The tenant with the longest queue for its weight; "" if nobody waits."""
        if len(self._tenants) == 1:
            return next(iter(self._tenants))
        lengths = {name: tenant.num_queued / tenant.weight for name, tenant in self._tenants.items()}
        return max(lengths, key=lambda name: lengths[name], default="")

    def came_before(self, latest: float) -> list[Sequence]:
        """The sequences that have not begun and came up to this time."""
        queued = (sequence for sequence in self._waiting.values() if sequence.state is SequenceState.QUEUED)
        return list(itertools.takewhile(lambda sequence: sequence.arrival_time <= latest, queued))

    # What tenants receive

    def start(self, sequence: Sequence, num_tokens: int) -> None:
        """Take a sequence out of the queue, since it runs now, and charge the prompt tokens that are to be computed."""
        name = sequence.request.tenant
        tenant = self._running[name] = self._tenant(name)
        tenant.num_running += 1
        if len(self._tenants) > 1:
            self._charge(tenant, num_tokens)
        self.remove(sequence)

    def end(self, sequence: Sequence) -> None:
        """Take note that a sequence runs no more."""
        tenant = self._running[sequence.request.tenant]
        tenant.num_running -= 1
        if tenant.num_running == 0:
            del self._running[sequence.request.tenant]

    def charge_decodes(self, prefilling: Sequence | None) -> None:
        """Charge one token for each running sequence but the one whose prompt is not yet computed."""
        if len(self._tenants) > 1:
            without = prefilling.request.tenant if prefilling else None
            for name, tenant in self._running.items():
                self._charge(tenant, tenant.num_running - (name == without))

    def runs_others(self, sequence: Sequence) -> bool:
        """Whether other sequences of its tenant run. An urgent one has no tenant in this sense."""
        return not sequence.request.urgent and sequence.request.tenant in self._running

    def most_served(self) -> str | None:
        """The running tenant with the highest counter; None if only one tenant runs."""
        if len(self._running) < 2:
            return None
        return max(self._running, key=lambda name: self._running[name].service)

    def check(self) -> None:
        """Assert that the parts agree with each other. For tests."""
        queues = [[*tenant.preempted.values(), *_queued(tenant)] for tenant in self._tenants.values()]
        listed = [sequence.request.uid for queue in queues for sequence in queue] + list(self._urgent)
        assert sorted(listed) == sorted(self._waiting), "a request waits twice or nowhere"
        weight = sum(tenant.weight for tenant in self._tenants.values() if tenant.waits)
        assert not weight or abs(self._waiting_weight - weight) < 1e-6, "the weight of those that wait is miscounted"
        for name, tenant in self._tenants.items():
            assert tenant.num_queued == len(list(_queued(tenant))), "the queue is miscounted"
            assert (tenant.num_running > 0) == (name in self._running), "a running tenant is unknown"
            assert tenant.has_entry or not tenant.waits, "a tenant waits outside the line"
            for level in tenant.levels.values():
                indices = [sequence.arrival_index for sequence in level.values()]
                assert indices == sorted(indices), "a queue is not in order of arrival"

    def _add_urgent(self, sequence: Sequence) -> None:
        uid = sequence.request.uid
        for queue in (self._waiting, self._urgent):
            queue[uid] = sequence
        self._urgent.move_to_end(uid, last=False)

    def _weight(self, name: str) -> float:
        return self._weights.get(name, 1.0)

    def _tenant(self, name: str) -> Tenant:
        tenant = self._tenants.get(name)
        if tenant is None:
            if len(self._tenants) >= self._max_tenants:
                self._forget_idle()
            tenant = self._tenants[name] = Tenant(self._weight(name))
        return tenant

    def _line_up(self, name: str) -> Tenant:
        """The tenant, which waits from now on."""
        tenant = self._tenant(name)
        if not tenant.waits:
            lowest = self._lowest()
            if lowest is None:
                self._floor, self._waiting_weight = self._highest, 0.0
            tenant.service = max(tenant.service, self._floor, lowest.service if lowest else 0.0)
            self._waiting_weight += tenant.weight
            if not tenant.has_entry:
                tenant.has_entry = True
                heapq.heappush(self._line, (tenant.service, next(self._entries), tenant))
        return tenant

    def _lowest(self) -> Tenant | None:
        """The waiting tenant with the lowest counter; among equals the one that began to wait first."""
        while self._line:
            service, number, tenant = self._line[0]
            if not tenant.waits:
                heapq.heappop(self._line)
                tenant.has_entry = False
            elif service < tenant.service:
                heapq.heapreplace(self._line, (tenant.service, number, tenant))
            else:
                return tenant
        return None

    def _charge(self, tenant: Tenant, num_tokens: int) -> None:
        tenant.service += num_tokens / tenant.weight
        self._highest = max(self._highest, tenant.service)
        if tenant.waits:
            self._floor += num_tokens / self._waiting_weight

    def _forget_idle(self) -> None:
        """Forget tenants without requests, except those that would not be lifted if they came back now."""
        floor = self._floor if self._lowest() else self._highest
        self._tenants = {
            name: tenant
            for name, tenant in self._tenants.items()
            if tenant.waits or tenant.num_running or tenant.service > floor
        }
        self._max_tenants = 2 * len(self._tenants) + MAX_IDLE_TENANTS


def _queued(tenant: Tenant) -> Iterator[Sequence]:
    return itertools.chain.from_iterable(level.values() for level in tenant.levels.values())


def _place(sequence: Sequence) -> tuple[float, int]:
    """What requests of one tenant are ordered by."""
    return sequence.arrival_time + PRIORITY_SECONDS * sequence.request.priority, sequence.arrival_index
