# SPDX-License-Identifier: Apache-2.0
"""The Router decides which sequences run in the next step. It lives in rank 0's worker and knows no torch.

The life of a request: `submit` puts it in the queue. `next_batch` admits it in order of arrival, once the pool can hold
it to its end beside all that run already, gives it a row and plans its prompt chunk by chunk, at most batch_max_tokens
new prompt tokens a step, beside one decode of each running sequence. `apply` turns the sampled tokens into chunks and
finds out who has ended. `finish` is the only end, whatever the reason, and makes the one chunk with a finish_reason.

Steps may overlap: `next_batch` for step N + 1 may be called before `apply` of step N, since it looks only at what is
planned, never at tokens. An EOS is then noticed one step late, and what its sequence does in that step is ignored.
Token slots and rows that are given back may be in a batch that still runs, but the device runs steps in order, so they
are reused at once.
"""

from __future__ import annotations

import heapq
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from lightllm_backend.kv_pool.allocator import TokenSlotAllocator
from lightllm_backend.request import FinishReason, Request, RequestError, TokenChunk
from lightllm_backend.router.admission import admissible, peak_tokens
from lightllm_backend.router.batch import Admission, Batch, StepResult
from lightllm_backend.router.request_table import RequestTable
from lightllm_backend.router.sequence import Sequence, SequenceState


@dataclass(frozen=True)
class RouterStats:
    """A snapshot for metrics and logs."""

    queued: int
    running: int
    kv_tokens_used: int
    kv_tokens_total: int
    prompt_tokens_total: int  # planned for prefill so far
    generated_tokens_total: int  # given out in chunks so far
    requests: dict[str, int]  # ended so far, by finish reason; "rejected": not taken by submit


class _PromptChunk(NamedTuple):
    row: int
    start: int
    slots: NDArray[np.int32]
    is_last: bool


class _PlannedStep(NamedTuple):
    """What `apply` needs of a batch. It names sequences, since a row may have changed hands by then."""

    batch: Batch
    sampling: list[Sequence]  # those that sample a token, in the order of the batch's rows
    eos_ends: NDArray[np.bool_]  # [n_sampled] an EOS as this token ends the sequence
    is_final: NDArray[np.bool_]  # [n_sampled] this token is the last of max_tokens


_Scalar = TypeVar("_Scalar", bound=np.generic)


def _followed_by(decodes: NDArray[_Scalar], prefills: list[int]) -> NDArray[_Scalar]:
    return np.concatenate([decodes, np.array(prefills, dtype=decodes.dtype)])


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
    ) -> None:
        assert min(max_running, batch_max_tokens, max_queue_size) > 0, "the limits are positive"
        self._batch_max_tokens = batch_max_tokens
        self._max_queue_size = max_queue_size
        self._eos_ids = np.array(sorted(eos_ids), dtype=np.int32)
        self._queue_timeout_s = queue_timeout_s
        self._clock = clock

        self._allocator = TokenSlotAllocator(capacity)
        self._table = RequestTable(max_running)
        self._live: dict[str, Sequence] = {}  # by uid, until they finish
        self._queue: OrderedDict[str, Sequence] = OrderedDict()  # in order of arrival
        self._prefilling: Sequence | None = None  # the one whose prompt is cut; nothing is admitted behind it
        self._in_flight: deque[_PlannedStep] = deque()
        self._deadlines: list[tuple[float, str]] = []  # a heap; uids that have finished stay in it for a while
        self._chunks: list[TokenChunk] = []  # not yet given out

        self._prompt_tokens_total = 0
        self._generated_tokens_total = 0
        self._requests: Counter[str] = Counter({reason.value: 0 for reason in FinishReason} | {"rejected": 0})

    # What clients ask for

    def submit(self, request: Request) -> None:
        """Queues the request, or raises the RequestError that answers it."""
        sequence = Sequence(request, self._clock())
        try:
            self._check_admissible(sequence)
        except RequestError:
            self._requests["rejected"] += 1
            raise
        self._live[request.uid] = self._queue[request.uid] = sequence
        if request.deadline is not None:
            if len(self._deadlines) > 2 * len(self._live) + 64:
                self._deadlines = [entry for entry in self._deadlines if entry[1] in self._live]
                heapq.heapify(self._deadlines)
            heapq.heappush(self._deadlines, (request.deadline, request.uid))

    def cancel(self, uid: str) -> None:
        """The client is gone. A uid that has ended in the meantime is no error."""
        if uid in self._live:
            self.finish(self._live[uid], FinishReason.CANCELLED)

    def stop(self, uid: str) -> None:
        """A stop string was found in the text. A uid that has ended in the meantime is no error."""
        if uid in self._live:
            self.finish(self._live[uid], FinishReason.STOP)

    # One step

    def next_batch(self) -> Batch | None:
        """Plans the next step; None when there is nothing to run."""
        self._expire()
        self._release_planned_out()
        decode_rows = self._table.decode_rows()
        decode_slots = self._allocator.allocate(len(decode_rows))
        decode_starts = self._table.append_decodes(decode_rows, decode_slots)
        chunks, admitted = self._plan_prefill()
        if len(decode_rows) == 0 and not chunks:
            return None
        batch = Batch(
            rows=_followed_by(decode_rows, [chunk.row for chunk in chunks]),
            starts=_followed_by(decode_starts, [chunk.start for chunk in chunks]),
            lengths=_followed_by(np.ones_like(decode_rows), [len(chunk.slots) for chunk in chunks]),
            slots=np.concatenate([decode_slots, *(chunk.slots for chunk in chunks)]),
            samples=_followed_by(np.ones(len(decode_rows), dtype=np.bool_), [chunk.is_last for chunk in chunks]),
            num_decodes=len(decode_rows),
            admitted=tuple(admitted),
        )
        rows = batch.rows[batch.samples]
        self._in_flight.append(
            _PlannedStep(
                batch=batch,
                sampling=self._table.owners[rows].tolist(),
                eos_ends=self._table.cached[rows] >= self._table.eos_from[rows],
                is_final=self._table.remaining[rows] == 0,
            )
        )
        return batch

    def apply(self, batch: Batch, result: StepResult) -> list[TokenChunk]:
        """Takes the tokens of the oldest batch that was not applied yet. Returns `drain_finished()` with its chunks."""
        step = self._in_flight.popleft()
        assert step.batch is batch, "batches are applied in the order in which they were made"
        assert len(result.tokens) == len(step.sampling), "one token for each sequence that samples"
        stops = step.eos_ends & (result.tokens[:, None] == self._eos_ids).any(axis=1)
        ends = (stops | step.is_final).tolist()
        tokens = result.tokens.tolist()
        log_probs = [] if result.log_probs is None else result.log_probs.tolist()
        for index, (sequence, token, ended) in enumerate(zip(step.sampling, tokens, ends, strict=True)):
            if sequence.state is SequenceState.FINISHED:
                continue
            self._generated_tokens_total += 1
            with_log_prob = log_probs and sequence.request.sampling.return_log_probs
            token_log_probs = [log_probs[index]] if with_log_prob else []
            if ended:
                reason = FinishReason.STOP if stops[index] else FinishReason.LENGTH
                self.finish(sequence, reason, token_ids=[token], log_probs=token_log_probs)
            else:
                self._chunks.append(sequence.make_chunk([token], token_log_probs))
        return self.drain_finished()

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
        del self._live[uid]
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
        for sequence in list(self._live.values()):
            self.finish(sequence, FinishReason.FAILED, error)

    # What others may know

    @property
    def has_work(self) -> bool:
        """Whether any request has not ended yet."""
        return bool(self._live)

    def stats(self) -> RouterStats:
        """The counters as they are now."""
        return RouterStats(
            queued=len(self._queue),
            running=len(self._live) - len(self._queue),
            kv_tokens_used=self._allocator.capacity - self._allocator.available,
            kv_tokens_total=self._allocator.capacity,
            prompt_tokens_total=self._prompt_tokens_total,
            generated_tokens_total=self._generated_tokens_total,
            requests=dict(self._requests),
        )

    def check_integrity(self) -> None:
        """Asserts that no slot, row or sequence is lost or there twice, and that the pool will suffice. For tests."""
        self._allocator.check(self._table.held_slots())
        self._table.check()
        owners = [owner for owner in self._table.owners if owner is not None]
        assert all(self._live.get(owner.request.uid) is owner for owner in owners), "an ended sequence has a row"
        for sequence in self._live.values():
            queued = sequence.state is SequenceState.QUEUED
            assert queued == (sequence.request.uid in self._queue), "the queue and a state disagree"
            assert not queued or sequence.row is None, "a queued sequence has a row"
            prefilling = sequence.state is SequenceState.PREFILLING
            assert prefilling == (sequence is self._prefilling), "a prompt is cut but not continued"
        rows = np.flatnonzero(self._table.decoding)
        held, remaining = self._table.cached[rows], self._table.remaining[rows]
        if self._prefilling is not None:
            planned = int(self._table.cached[self._prefilling.row])
            partial_held, partial_remaining = self._demand(self._prefilling, planned)
            held, remaining = np.append(held, partial_held), np.append(remaining, partial_remaining)
        peak = peak_tokens(held.astype(np.int64), remaining.astype(np.int64))
        assert peak <= self._allocator.capacity, f"{peak} token slots will be asked for"

    # How a step is planned

    def _check_admissible(self, sequence: Sequence) -> None:
        request = sequence.request
        if request.uid in self._live:
            raise RequestError("INVALID_ARG", f"uid {request.uid!r} belongs to a request that has not ended")
        if sequence.max_slots > self._allocator.capacity:
            raise RequestError(
                "INVALID_ARG",
                f"the prompt has {sequence.prompt_length} tokens and max_tokens is {request.sampling.max_tokens}; "
                f"that takes {sequence.max_slots} token slots, and the KV pool has {self._allocator.capacity}",
            )
        if len(self._queue) >= self._max_queue_size:
            raise RequestError("UNAVAILABLE", f"the queue is full ({len(self._queue)} requests)")

    def _expire(self) -> None:
        now = self._clock()
        while self._deadlines and self._deadlines[0][0] <= now:
            deadline, uid = heapq.heappop(self._deadlines)
            sequence = self._live.get(uid)
            if sequence is not None and sequence.request.deadline == deadline:
                error = RequestError("CANCELLED", "the request's deadline has passed")
                self.finish(sequence, FinishReason.CANCELLED, error)
        while self._queue_timeout_s is not None and self._queue:
            oldest = next(iter(self._queue.values()))
            if oldest.arrival + self._queue_timeout_s > now:
                break
            message = f"the request waited in the queue for {self._queue_timeout_s:g} seconds"
            self.finish(oldest, FinishReason.FAILED, RequestError("UNAVAILABLE", message))

    def _release_planned_out(self) -> None:
        """Takes back what sequences hold whose last step is planned, though its token is not known yet.

        They read their slots for the last time in a step that runs before any that could use the slots anew. So the
        demand on the pool is the one that admission foresees, also when steps overlap.
        """
        for sequence in self._table.owners[self._table.planned_out_rows()]:
            self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        if sequence.row is not None:
            self._allocator.free(self._table.release_row(sequence))

    def _plan_prefill(self) -> tuple[list[_PromptChunk], list[Admission]]:
        """Chunks of at most batch_max_tokens together: the prompt that was cut last time, then newcomers."""
        budget = self._batch_max_tokens
        chunks: list[_PromptChunk] = []
        if self._prefilling is not None:
            chunks.append(self._plan_chunk(self._prefilling, budget))
            budget -= len(chunks[0].slots)
        admitted = []
        for sequence in self._admit(budget):
            request = sequence.request
            admitted.append(Admission(self._table.take_row(sequence), request.prompt_ids, request.sampling))
            chunks.append(self._plan_chunk(sequence, budget))
            budget -= len(chunks[-1].slots)
        self._prompt_tokens_total += self._batch_max_tokens - budget
        return chunks, admitted

    def _plan_chunk(self, sequence: Sequence, budget: int) -> _PromptChunk:
        row = sequence.row
        assert row is not None, "a sequence prefills in a row"
        start = int(self._table.cached[row])
        length = min(sequence.prompt_length - start, budget)
        slots = self._allocator.allocate(length)
        self._table.append_chunk(row, slots)
        is_last = start + length == sequence.prompt_length
        self._table.decoding[row] = is_last
        sequence.state = SequenceState.RUNNING if is_last else SequenceState.PREFILLING
        self._prefilling = None if is_last else sequence
        return _PromptChunk(row, start, slots, is_last)

    def _admit(self, budget: int) -> list[Sequence]:
        """Takes the sequences out of the queue whose first chunk is planned now, within the budget of prompt tokens.

        Only the last of them may exceed it, and then spends all of it: so at most one prompt is cut at any time.
        """
        candidates: list[Sequence] = []
        held: list[int] = []
        remaining: list[int] = []
        for sequence in islice(self._queue.values(), self._table.num_free_rows):
            if budget <= 0:
                break
            candidates.append(sequence)
            slots_held, slots_remaining = self._demand(sequence, planned=min(budget, sequence.prompt_length))
            held.append(slots_held)
            remaining.append(slots_remaining)
            budget -= sequence.prompt_length
        rows = np.flatnonzero(self._table.decoding)
        count = admissible(
            self._table.cached[rows].astype(np.int64),
            self._table.remaining[rows].astype(np.int64),
            np.array(held, dtype=np.int64),
            np.array(remaining, dtype=np.int64),
            self._allocator.capacity,
        )
        now = self._clock()
        for sequence in candidates[:count]:
            del self._queue[sequence.request.uid]
            sequence.queue_seconds = now - sequence.arrival
        return candidates[:count]

    def _demand(self, sequence: Sequence, planned: int) -> tuple[int, int]:
        """(held, remaining) for admission, once `planned` tokens of the prompt are.

        What is left of the prompt takes k more steps of at least one token each. So it never holds more than a sequence
        that held k slots less than the prompt now and took one in each of them, and holds as many from then on.
        """
        steps = -(-(sequence.prompt_length - planned) // self._batch_max_tokens)
        return sequence.prompt_length - steps, sequence.request.sampling.max_tokens - 1 + steps
