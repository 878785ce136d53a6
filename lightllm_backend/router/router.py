# SPDX-License-Identifier: Apache-2.0
"""The Router decides which sequences run in the next step. It lives in rank 0's worker and knows no torch.

The life of a request: `submit` puts it in the queue. `next_batch` admits it in order of arrival, once the pool can hold
it to its end beside all that run already (or is likely to, as the policy has it), gives it a row and plans its prompt
chunk by chunk, at most batch_max_tokens new prompt tokens a step, beside one decode of each running sequence. `apply`
takes the sampled tokens and finds out who has ended. `finish` is the only end, whatever the reason, and makes the one
chunk with a finish_reason.

Steps may overlap: `next_batch` for step N + 1 may be called before `apply` of step N, since it looks only at what is
planned, never at tokens. An EOS is then noticed one step late, and what its sequence does in that step is ignored.
Token slots and rows that are given back may be in a batch that still runs, but the device runs steps in order, so they
are reused at once.

Where a policy has let in more than the pool can hold, those that came last are paused: they give back what they hold
and go to the front of the queue, so the queue stays in order of arrival and whoever came first always goes on. Later a
paused sequence prefills its prompt and all that it has generated, and goes on from there.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable

import numpy as np

from lightllm_backend.request import FinishReason, Request, RequestError, TokenChunk
from lightllm_backend.router.admission import AdmissionPolicy, ExactAdmission, Gate, Refusal, newcomer_demand
from lightllm_backend.router.batch import Admission, Batch, StepOutput, StepResult
from lightllm_backend.router.deadlines import Deadlines
from lightllm_backend.router.planned_step import Decodes, PlannedStep, PromptChunk, make_batch
from lightllm_backend.router.request_table import RequestTable
from lightllm_backend.router.sequence import Sequence, SequenceState
from lightllm_backend.router.slot_pool import Prefix, SlotPool
from lightllm_backend.router.statistics import EngineStats


class Router:
    """Owns the state of every sequence, the rows of the request table and the token slots of the KV pool."""

    def __init__(
        self,
        capacity: int,
        max_running: int,
        batch_max_tokens: int,
        max_queue_size: int,
        eos_ids: frozenset[int],
        queue_timeout_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        policy: AdmissionPolicy | None = None,
        prefix_cache: bool = True,
    ) -> None:
        assert min(max_running, batch_max_tokens, max_queue_size) > 0, "the limits are positive"
        self._batch_max_tokens = batch_max_tokens
        self._max_queue_size = max_queue_size
        self._queue_timeout_s = queue_timeout_s
        self._clock = clock
        self._policy = policy or ExactAdmission()

        self._table = RequestTable(max_running, len(self._policy.draw()), sorted(eos_ids))
        self._pool = SlotPool(capacity, self._table, prefix_cache)
        self._live: dict[str, Sequence] = {}  # by uid, until they finish
        self._by_number: dict[int, Sequence] = {}  # the same
        self._queue: OrderedDict[str, Sequence] = OrderedDict()  # in order of arrival; first those that are paused
        self._prefilling: Sequence | None = None  # the one whose prompt is cut; nothing is admitted behind it
        self._in_flight: deque[PlannedStep] = deque()
        self._deadlines = Deadlines(self._live)
        self._chunks: list[TokenChunk] = []  # not yet given out

        self._numbers = itertools.count()
        self._urgent_numbers = itertools.count(-1, -1)  # older than all others
        self._step = 0
        self._closed: RequestError | None = None  # what further requests are refused with
        self._refusal: Refusal | None = None  # of the first in the queue
        self._pauses_total = 0
        self._prompt_tokens_total = 0
        self._generated_tokens_total = 0
        self._device_seconds_total = 0.0
        self._requests: Counter[str] = Counter({reason.value: 0 for reason in FinishReason} | {"rejected": 0})

    # What clients ask for

    def submit(self, request: Request, handle: int = 0) -> None:
        """Queues the request, or raises the RequestError that answers it. The handle is what outputs will call it."""
        number = next(self._urgent_numbers if request.urgent else self._numbers)
        sequence = Sequence(request, handle, number, self._clock(), self._policy.draw())
        try:
            self._check_admissible(sequence)
        except RequestError:
            self._requests["rejected"] += 1
            raise
        self._live[request.uid] = self._by_number[sequence.number] = self._queue[request.uid] = sequence
        if request.urgent:
            self._queue.move_to_end(request.uid, last=False)
        if request.deadline is not None:
            self._deadlines.add(request.deadline, request.uid)

    def cancel(self, uid: str) -> None:
        """The client is gone. A uid that has ended in the meantime is no error."""
        if uid in self._live:
            self.finish(self._live[uid], FinishReason.CANCELLED)

    def stop(self, uid: str) -> None:
        """A stop string was found in the text. A uid that has ended in the meantime is no error."""
        if uid in self._live:
            sequence = self._live[uid]
            if sequence.row is not None:
                self._learn(sequence, self._table.num_generated(sequence.row))
            self.finish(sequence, FinishReason.STOP)

    # One step

    def next_batch(self) -> Batch | None:
        """Plans the next step; None when there is nothing to run."""
        self._step += 1
        self._expire()
        self._release_planned_out()
        self._pause_until_it_fits()
        decode_rows = self._table.decode_rows_longest_first()
        decode_slots = self._pool.allocate(len(decode_rows))
        decode_starts = self._table.append_decodes(decode_rows, decode_slots)
        chunks, admitted = self._plan_prefill()
        if len(decode_rows) == 0 and not chunks:
            return None
        batch = make_batch(Decodes(decode_rows, decode_starts, decode_slots), chunks, admitted)
        self._in_flight.append(PlannedStep.of(batch, self._table))
        return batch

    def apply(self, batch: Batch, result: StepResult) -> StepOutput:
        """Takes the tokens of the oldest batch that was not applied yet. Its output includes `drain_finished()`."""
        step = self._in_flight.popleft()
        tokens = result.tokens
        assert step.batch is batch, "batches are applied in the order in which they were made"
        assert len(tokens) == len(step.rows), "one token for each sequence that samples"
        self._device_seconds_total += result.seconds
        stops = step.may_end & (tokens[:, None] == step.ending_ids).any(axis=1)
        ends = stops | step.is_final
        known = step.holds_row
        self._table.record(step.rows[known], step.positions[known], tokens[known])
        goes_on = known & step.is_plain & ~ends
        for index in (~goes_on).nonzero()[0].tolist():
            sequence = self._by_number.get(int(step.numbers[index]))
            if sequence is None:
                continue  # it has ended in the meantime
            self._generated_tokens_total += 1
            log_probs = []
            if sequence.request.sampling.return_log_probs and result.log_probs is not None:
                log_probs.append(float(result.log_probs[index]))
            token_ids = [int(tokens[index])]
            if sequence.state is SequenceState.PAUSED:
                sequence.known_ids = np.append(sequence.known_ids, tokens[index])
                sequence.num_due -= 1
            if ends[index]:
                self._learn(sequence, int(step.positions[index]) + 1 - sequence.prompt_length)
                reason = FinishReason.STOP if stops[index] else FinishReason.LENGTH
                self.finish(sequence, reason, token_ids=token_ids, log_probs=log_probs)
            else:
                self._chunks.append(sequence.make_chunk(token_ids, log_probs))
        handles = self._table.handles[step.rows[goes_on]]
        self._generated_tokens_total += len(handles)
        return StepOutput(handles, tokens[goes_on], self.drain_finished())

    def drain_finished(self) -> list[TokenChunk]:
        """The chunks that were not given out yet: of sequences that ended without a step."""
        chunks, self._chunks = self._chunks, []
        return chunks

    def finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        error: RequestError | None = None,
        token_ids: list[int] | None = None,
        log_probs: list[float] | None = None,
    ) -> None:
        """The only end of a sequence: gives back its slots and its row and makes its last chunk."""
        assert sequence.state is not SequenceState.FINISHED, "a sequence ends once"
        uid = sequence.request.uid
        del self._live[uid], self._by_number[sequence.number]
        self._queue.pop(uid, None)
        if sequence is self._prefilling:
            self._prefilling = None
        self._release(sequence)
        sequence.state = SequenceState.FINISHED
        self._requests[reason.value] += 1
        self._chunks.append(sequence.make_chunk(token_ids or [], log_probs or [], reason, error))

    def fail_all(self, error: RequestError) -> None:
        """A step has failed: every sequence ends with the error, and the batches in flight are never applied."""
        self._in_flight.clear()
        self._end_all(error)
        self._pool.clear_cache()

    def close(self, error: RequestError) -> None:
        """The server goes down: every sequence ends with the error, and further requests are refused with it."""
        self._closed = error
        self._end_all(error)

    def _end_all(self, error: RequestError) -> None:
        for sequence in list(self._live.values()):
            self.finish(sequence, FinishReason.FAILED, error)

    # What others may know

    @property
    def has_work(self) -> bool:
        """Whether any request has not ended yet."""
        return bool(self._live)

    @property
    def has_queue(self) -> bool:
        """Whether any request waits for admission."""
        return bool(self._queue)

    def stats(self) -> EngineStats:
        """The counters as they are now."""
        return EngineStats(
            queued_requests=len(self._queue),
            running_requests=len(self._live) - len(self._queue),
            kv_tokens_used=self._pool.capacity - self._pool.available,
            kv_tokens_cached=self._pool.num_evictable,
            kv_tokens_total=self._pool.capacity,
            pauses_total=self._pauses_total,
            prompt_tokens_total=self._prompt_tokens_total,
            generated_tokens_total=self._generated_tokens_total,
            device_seconds_total=self._device_seconds_total,
        )

    @property
    def ended_requests(self) -> dict[str, int]:
        """How many requests have ended, by finish reason; "rejected" are those that submit did not take."""
        return dict(self._requests)

    def check_integrity(self) -> None:
        """Asserts that no slot, row or sequence is lost or there twice, and that the pool will suffice. For tests."""
        self._pool.check()
        self._table.check()
        owners = [owner for owner in self._table.owners if owner is not None]
        assert all(self._live.get(owner.request.uid) is owner for owner in owners), "an ended sequence has a row"
        for sequence in self._live.values():
            queued = sequence.state in (SequenceState.QUEUED, SequenceState.PAUSED)
            assert queued == (sequence.request.uid in self._queue), "the queue and a state disagree"
            assert not queued or sequence.row is None, "a queued sequence has a row"
            prefilling = sequence.state is SequenceState.PREFILLING
            assert prefilling == (sequence is self._prefilling), "a prompt is cut but not continued"
        numbers = [sequence.number for sequence in self._queue.values()]
        assert numbers == sorted(numbers), "the queue is not in order of arrival"
        if isinstance(self._policy, ExactAdmission):
            assert self._pauses_total == 0, "nobody is ever in need"
            peak = self._pool.peak(self._batch_max_tokens)
            assert peak <= self._pool.capacity, f"{peak} token slots will be asked for"

    # How a step is planned

    def _check_admissible(self, sequence: Sequence) -> None:
        request = sequence.request
        if self._closed:
            raise self._closed
        if request.uid in self._live:
            raise RequestError("INVALID_ARG", f"uid {request.uid!r} belongs to a request that has not ended")
        if sequence.max_slots > self._pool.capacity:
            raise RequestError(
                "INVALID_ARG",
                f"the prompt has {sequence.prompt_length} tokens and max_tokens is {request.sampling.max_tokens}; "
                f"that takes {sequence.max_slots} token slots, and the KV pool has {self._pool.capacity}",
            )
        if len(self._queue) >= self._max_queue_size and not request.urgent:
            raise RequestError("UNAVAILABLE", f"the queue is full ({len(self._queue)} requests)")

    def _expire(self) -> None:
        now = self._clock()
        for sequence in self._deadlines.passed(now):
            error = RequestError("CANCELLED", "the request's deadline has passed")
            self.finish(sequence, FinishReason.CANCELLED, error)
        if self._queue_timeout_s is None:
            return
        waiting = (sequence for sequence in self._queue.values() if sequence.state is SequenceState.QUEUED)
        latest = now - self._queue_timeout_s
        message = f"the request waited in the queue for {self._queue_timeout_s:g} seconds"
        for sequence in list(itertools.takewhile(lambda sequence: sequence.arrival <= latest, waiting)):
            self.finish(sequence, FinishReason.FAILED, RequestError("UNAVAILABLE", message))

    def _release_planned_out(self) -> None:
        """Takes back what sequences hold whose last step is planned, though its token is not known yet.

        They read their slots for the last time in a step that runs before any that could use the slots anew. So the
        demand on the pool is the one that admission foresees, also when steps overlap.
        """
        for sequence in self._table.owners[self._table.planned_out_rows()]:
            self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        """Takes the sequence's row and slots back."""
        if sequence.row is not None:
            if self._table.remaining[sequence.row] > 0:
                self._refusal = None
            self._pool.release(sequence.row)
            self._table.release_row(sequence)
            for step in self._in_flight:
                step.holds_row[step.numbers == sequence.number] = False

    def _pause_until_it_fits(self) -> None:
        """Makes sure of slots for a decode of each sequence, and for a chunk of the prompt that is cut."""
        while self._slots_needed() > self._pool.available:
            self._pause(self._prefilling or self._table.newest())

    def _slots_needed(self) -> int:
        needed = int(np.count_nonzero(self._table.decoding))
        if self._prefilling is not None:
            left = self._prefilling.known_length - int(self._table.cached[self._prefilling.row])
            needed += min(left, self._batch_max_tokens)
        return needed

    def _pause(self, sequence: Sequence) -> None:
        """Takes back all that the sequence holds. It is the newest of those that run, so the queue stays in order."""
        row = sequence.row
        assert row is not None, "a sequence that runs has a row"
        sequence.known_ids = self._table.known_tokens(row).copy()
        sequence.num_due = self._table.num_sampled(row) - sequence.num_generated
        self._release(sequence)
        if sequence is self._prefilling:
            self._prefilling = None
        sequence.state = SequenceState.PAUSED
        self._queue[sequence.request.uid] = sequence
        self._queue.move_to_end(sequence.request.uid, last=False)
        self._pauses_total += 1

    def _learn(self, sequence: Sequence, length: int) -> None:
        """An answer has ended by itself: its length is of use for the admission of others."""
        if not sequence.request.sampling.ignore_eos:
            self._policy.ended(length)

    def _plan_prefill(self) -> tuple[list[PromptChunk], list[Admission]]:
        """Chunks of at most batch_max_tokens together: the prompt that was cut last time, then newcomers.

        Only the last of them may exceed what is left, and then takes all of it: so at most one prompt is cut at a time.
        """
        budget = self._batch_max_tokens
        chunks: list[PromptChunk] = []
        if self._prefilling is not None:
            chunks.append(self._plan_chunk(self._prefilling, budget))
            budget -= len(chunks[0].slots)
        admitted: list[Admission] = []
        gate = None
        plannable = self._pool.plannable
        while budget > 0 and self._queue and self._table.num_free_rows > 0:
            sequence = next(iter(self._queue.values()))
            refused = self._refusal and self._refusal.holds(sequence.number, self._step, self._pool.plannable)
            if sequence.num_due or refused:
                break
            # The one whose prompt is cut has all of the budget, so whoever runs decodes.
            gate = gate or Gate(self._policy, self._table.demand(self._pool.shared))
            prefix = self._pool.find(sequence.known_ids)
            planned = min(sequence.known_length, prefix.length + budget)
            demand = newcomer_demand(sequence, planned, prefix.num_shared, self._batch_max_tokens)
            if not gate.admits(demand, self._pool.plannable):
                if self._pool.plannable == plannable:  # else the gate counts twice what newcomers have come to share
                    self._refusal = Refusal(sequence.number, self._step + gate.wait(demand, plannable), plannable)
                break
            admitted.append(self._admit(sequence, prefix))
            chunks.append(self._plan_chunk(sequence, budget))
            budget -= len(chunks[-1].slots)
        self._prompt_tokens_total += self._batch_max_tokens - budget
        return chunks, admitted

    def _admit(self, sequence: Sequence, prefix: Prefix) -> Admission:
        """Takes the sequence out of the queue and gives it a row."""
        request = sequence.request
        del self._queue[request.uid]
        if sequence.state is SequenceState.QUEUED:
            sequence.queue_seconds = self._clock() - sequence.arrival
        slots = prefix.slots()
        row = self._table.take_row(sequence, slots)
        self._pool.hold(row, prefix)
        generated = sequence.known_ids[sequence.prompt_length :].tolist()
        return Admission(row, request.prompt_ids, request.sampling, tuple(generated), tuple(slots.tolist()))

    def _plan_chunk(self, sequence: Sequence, budget: int) -> PromptChunk:
        row = sequence.row
        assert row is not None, "a sequence prefills in a row"
        start = int(self._table.cached[row])
        length = min(sequence.known_length - start, budget)
        slots = self._pool.allocate(length)
        self._table.append_chunk(row, slots)
        self._pool.publish(row)
        is_last = start + length == sequence.known_length
        self._table.decoding[row] = is_last
        sequence.state = SequenceState.RUNNING if is_last else SequenceState.PREFILLING
        self._prefilling = None if is_last else sequence
        return PromptChunk(row, start, slots, is_last)
