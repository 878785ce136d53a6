# SPDX-License-Identifier: Apache-2.0
"""Router: the scheduler. It runs in rank 0's worker and does not import torch.

The life of a request: `submit` queues it. `next_batch` admits queued requests in order of arrival, with a fair share
for each tenant (fair_queue.py), as soon as the KV pool can hold them to their end beside all running sequences (or
probably can, if the policy estimates). It gives each a row and plans its prompt in chunks, at most batch_max_tokens new
prompt tokens per step, beside one decode of each running sequence. `apply` takes the sampled tokens and ends
sequences. `finish` is the only end, whatever the reason, and makes the one chunk with a finish_reason.

Steps overlap: the worker may call `next_batch` for step N + 1 before `apply` of step N, since planning never looks at
tokens. The Router then notices an EOS one step late, and ignores what the sequence does in that step. It reuses
released rows and token slots at once, even if a running batch contains them: the device runs steps in order. The same
holds for the slots of layer groups with a window that no query can see any more: each step begins by giving them back.

Nobody overtakes the request whose turn it is, and no sequence is preempted for fairness. If a policy has admitted more
than the pool can hold, the Router preempts the newest sequences of the tenant that has received most: they release
their slots, return to the front of its queue, and later prefill their prompt and their generated tokens. A sequence
that outgrows `recompute_at` is put back in the same way.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from lightllm_backend.kv_pool.layer_groups import ONE_GROUP, LayerGroups
from lightllm_backend.request import FinishReason, Request, RequestError, TokenChunk
from lightllm_backend.router.admission import AdmissionPolicy, ExactAdmission, Gate, candidate_demand
from lightllm_backend.router.batch import Admission, Batch, RouterOutput, StepResult
from lightllm_backend.router.deadlines import Deadlines
from lightllm_backend.router.fair_queue import FairQueue
from lightllm_backend.router.planned_step import Decodes, PlannedStep, PromptChunk, make_batch
from lightllm_backend.router.request_table import RequestTable
from lightllm_backend.router.sequence import Sequence, SequenceState, TextMatcher
from lightllm_backend.router.slot_pool import Prefix, SlotPool
from lightllm_backend.router.statistics import EngineStats, no_steps

NOT_NUMBERS = RequestError(
    "INTERNAL",
    "the model's logits are not numbers: its weights hold NaN or infinities (download them again), or float16 overflows"
    " (try --dtype bfloat16 or float32)",
)


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
        prefix_cache: bool | str = True,
        tenant_weights: Mapping[str, float] | None = None,
        tenant_reserve: float = 0.0,
        recompute_at: int | None = None,
        groups: LayerGroups = ONE_GROUP,
    ) -> None:
        """capacity: the slots of the KV pool, of which a token takes one in each of the layer `groups`.

        prefix_cache: "tenant" keeps those of tenants apart. tenant_reserve: see `_plan_prefill`. recompute_at: a
        sequence that grows beyond so many tokens computes all its K and V anew, since K of longer sequences turns
        otherwise (longrope). groups: one of all layers by default; with windows, prefixes are not shared.
        """
        self._groups = groups
        assert not (prefix_cache and groups.num_windowed), "what is given back cannot be shared"
        assert min(max_running, batch_max_tokens, max_queue_size) > 0, "the limits are positive"
        self._batch_max_tokens = batch_max_tokens
        self._max_queue_size = max_queue_size
        self._queue_timeout_s = queue_timeout_s
        self._clock = clock
        self._policy = policy or ExactAdmission()
        self._recompute_at = recompute_at

        self._table = RequestTable(max_running, len(self._policy.draw_quantiles()), sorted(eos_ids), self._groups)
        self._pool = SlotPool(capacity, self._table, bool(prefix_cache), by_tenant=prefix_cache == "tenant")
        self._reserve = math.ceil(tenant_reserve * max_running), math.ceil(tenant_reserve * capacity)
        self._live: dict[str, Sequence] = {}  # by uid; the sequences that have not ended
        self._by_arrival_index: dict[int, Sequence] = {}  # the same sequences
        self._num_answers: dict[str, int] = {}  # that have not ended, of requests with several, by the tree they share
        self._queue = FairQueue(tenant_weights)
        self._prefilling: Sequence | None = None  # the one whose prompt is cut; admission waits for it
        self._in_flight: deque[PlannedStep] = deque()
        self._deadlines = Deadlines(self._live)
        self._chunks: list[TokenChunk] = []  # not yet returned

        self._arrival_indices = itertools.count()
        self._urgent_indices = itertools.count(-1, -1)  # before all others
        self._closed: RequestError | None = None  # the error that refuses further requests
        self._preemptions_total = 0
        self._prompt_tokens_total = 0
        self._generated_tokens_total = 0
        self._device_seconds_total = 0.0
        self._launch_seconds_total = 0.0
        self._steps_total = no_steps()
        self._step_tokens_total = no_steps()
        self._prefix_cache_queries_total = 0
        self._prefix_cache_hits_total = 0
        self._requests: Counter[str] = Counter({reason.value: 0 for reason in FinishReason})

    # Requests of clients

    def submit(self, request: Request, handle: int = 0, matcher: TextMatcher | None = None) -> None:
        """Queue the request, or raise the RequestError that answers it.

        Outputs name its first answer by `handle`, the second by `handle` + 1 and so on. All but the first join the
        queue, in front, when the first is admitted: they then find the prompt's K and V in the prefix cache, or in a
        tree of their own if the cache is off (not with layer groups that have a window). matcher: of structured output;
        each further answer has a copy.
        """
        indices = self._urgent_indices if request.urgent else self._arrival_indices
        tree = request.uid if request.sampling.n > 1 else ""
        sequence, *copies = (
            Sequence(
                one, handle + number, next(indices), self._clock(), self._policy.draw_quantiles(),
                matcher=matcher.copy() if matcher and number else matcher, tree=tree,
            )
            for number, one in enumerate(request.copies())
        )  # fmt: skip
        try:
            self._check_admissible(sequence)
        except RequestError:
            self._requests[FinishReason.REJECTED.value] += 1
            raise
        sequence.copies = copies
        self._register(sequence)
        self._queue.add(sequence)
        if tree:
            self._num_answers[tree] = len(copies) + 1

    def _register(self, sequence: Sequence) -> None:
        request = sequence.request
        self._live[request.uid] = self._by_arrival_index[sequence.arrival_index] = sequence
        if request.deadline is not None:
            self._deadlines.add(request.deadline, request.uid)

    def cancel(self, uid: str) -> None:
        """End a request whose client has gone. It may have ended already."""
        if uid in self._live:
            self.finish(self._live[uid], FinishReason.CANCELLED)

    def stop(self, uid: str) -> None:
        """End a request whose text has a stop string. It may have ended already."""
        if uid in self._live:
            sequence = self._live[uid]
            if sequence.row is not None:
                self._record_length(sequence, self._table.num_generated(sequence.row))
            self.finish(sequence, FinishReason.STOP)

    def follow(self, uid: str, matcher: TextMatcher) -> None:
        """Give a request the matcher that it was submitted without. It may have ended already."""
        if uid in self._live:
            self._live[uid].matcher = matcher

    def refuse(self, uid: str, error: RequestError) -> None:
        """End a request that turns out to be inadmissible. It may have ended already."""
        if uid in self._live:
            self.finish(self._live[uid], FinishReason.REJECTED, error)

    def withdraw(self, uid: str) -> None:
        """Forget a request for one answer that has no token yet, as if it had not been submitted."""
        if uid in self._live:
            self.finish(self._live[uid], FinishReason.CANCELLED)
            self._chunks.pop()
            self._requests[FinishReason.CANCELLED.value] -= 1

    def on_free(self, call: Callable[[NDArray[np.int32]], None]) -> None:
        """Call this with the token slots whenever some become free; all steps that use them are launched then."""
        self._pool.on_free(call)

    # One step

    def next_batch(self) -> Batch | None:
        """Plan the next step; None if there is nothing to run."""
        self._expire()
        self._release_planned_out()
        self._put_back_what_outgrows()
        self._pool.give_back()
        self._preempt_until_it_fits()
        self._queue.charge_decodes(self._prefilling)
        decode_rows = self._table.decode_rows_longest_first()
        decode_slots = self._pool.allocate(len(decode_rows))
        decode_starts = self._table.append_decodes(decode_rows, decode_slots)
        chunks, admitted = self._plan_prefill()
        if len(decode_rows) == 0 and not chunks:
            return None
        kind = "decode" if not chunks else "mixed" if len(decode_rows) else "prefill"
        self._steps_total[kind] += 1
        self._step_tokens_total[kind] += len(decode_rows) + sum(chunk.num_tokens for chunk in chunks)
        batch = make_batch(Decodes(decode_rows, decode_starts, decode_slots), chunks, admitted)
        self._in_flight.append(PlannedStep.of(batch, self._table))
        return batch

    def matchers(self, batch: Batch) -> list[TextMatcher | None]:
        """Return the matchers of the sequences with structured output in the newest batch, in its order.

        All batches before it must be applied. None: the sequence has ended since, and any token will do.
        """
        step = self._in_flight[-1]
        assert step.batch is batch, "the batch is the newest"
        assert len(self._in_flight) == 1, "the matchers have accepted all tokens"
        owners = map(self._by_arrival_index.get, step.arrival_indices[step.structured].tolist())
        return [owner.matcher if owner else None for owner in owners]

    def apply(self, batch: Batch, result: StepResult) -> RouterOutput:
        """Take the tokens of the oldest batch in flight. The output includes `drain_finished()`."""
        step = self._in_flight.popleft()
        token_ids = result.token_ids
        assert step.batch is batch, "batches are applied in the order in which they were made"
        assert len(token_ids) == len(step.rows), "one token for each sequence that samples"
        self._device_seconds_total += result.seconds
        self._launch_seconds_total += result.launch_seconds
        without = token_ids < 0
        if result.log_probs is not None:  # NaN also if the logits of tokens that a mask rules out are
            without = without | ~np.isfinite(result.log_probs)
        if without.any():
            self._fail_without_logits(step, step.arrival_indices[without].tolist())
        stops = step.may_end & (token_ids[:, None] == step.ending_ids).any(axis=1)
        ends = stops | step.is_final
        known = step.holds_row
        self._take_scores(step, result)
        self._table.record(step.rows[known], step.positions[known], token_ids[known])
        accepted = self._accept(step, token_ids)
        goes_on = known & step.is_plain & ~ends
        goes_on[[index for index, complete in accepted.items() if complete]] = False  # or has an error
        top = result.top_log_probs.by_sample() if result.top_log_probs else {}
        for index in (~goes_on).nonzero()[0].tolist():
            sequence = self._by_arrival_index.get(int(step.arrival_indices[index]))
            if sequence is None:
                continue  # it has ended since
            sampling = sequence.request.sampling
            if sampling.max_tokens == 0:
                self.finish(sequence, FinishReason.LENGTH)
                continue
            self._generated_tokens_total += 1
            log_probs, likeliest = [], b""
            if sampling.return_log_probs and result.log_probs is not None:
                log_probs.append(float(result.log_probs[index]))
            if index in top:
                likeliest = top[index][: sampling.top_logprobs].tobytes()
            sampled = [int(token_ids[index])]
            complete = accepted.get(index, False)
            if isinstance(complete, RequestError):
                self.finish(sequence, FinishReason.FAILED, complete)
                continue
            if sequence.state is SequenceState.PREEMPTED:
                sequence.known_ids = np.append(sequence.known_ids, token_ids[index])
                sequence.num_due -= 1
            if ends[index] or complete:
                self._record_length(sequence, int(step.positions[index]) + 1 - sequence.prompt_length)
                reason = FinishReason.STOP if stops[index] or complete else FinishReason.LENGTH
                self.finish(sequence, reason, token_ids=sampled, log_probs=log_probs, top_log_probs=likeliest)
            else:
                self._chunks.append(sequence.make_chunk(sampled, log_probs, top_log_probs=likeliest))
        handles = self._table.handles[step.rows[goes_on]]
        self._generated_tokens_total += len(handles)
        return RouterOutput(handles, token_ids[goes_on], self.drain_finished())

    def _fail_without_logits(self, step: PlannedStep, arrival_indices: list[int]) -> None:
        """End the sequences whose logits are not numbers. The rest of `apply` then leaves them out.

        Attention multiplies what a query must not see by 0, which leaves NaN as it is. So K and V of tokens before the
        first NaN may be spoiled too, and others may have found them in the prefix cache, which is given up.
        """
        for arrival_index in arrival_indices:
            sequence = self._by_arrival_index.get(arrival_index)
            if sequence is not None:
                self.finish(sequence, FinishReason.FAILED, NOT_NUMBERS)
        step.holds_row[np.isin(step.arrival_indices, arrival_indices)] = False
        self._pool.abandon_cache()

    def _accept(self, step: PlannedStep, token_ids: NDArray[np.int32]) -> dict[int, bool | RequestError]:
        """Give the matchers the tokens of their sequences; return what TextMatcher.accept_all says, by index."""
        matchers = {}
        for index in step.structured.nonzero()[0].tolist():
            sequence = self._by_arrival_index.get(int(step.arrival_indices[index]))
            if sequence is not None and sequence.matcher is not None and sequence.request.sampling.max_tokens > 0:
                matchers[index] = sequence.matcher
        if not matchers:
            return {}
        live = list(matchers.values())
        outcomes = live[0].accept_all(live, [int(token_ids[index]) for index in matchers])
        return dict(zip(matchers, outcomes, strict=True))

    def _take_scores(self, step: PlannedStep, result: StepResult) -> None:
        for chunk, arrival_index, scores in zip(step.batch.scored, step.scored_arrivals, result.scores, strict=True):
            sequence = self._by_arrival_index.get(arrival_index)
            if sequence is None:
                continue
            if np.isnan(scores.log_probs).any():
                self._fail_without_logits(step, [arrival_index])
            else:
                sequence.take_scores(int(step.batch.starts[chunk.batch_index]), scores)

    def drain_finished(self) -> list[TokenChunk]:
        """Return the pending chunks: those of sequences that ended outside a step."""
        chunks, self._chunks = self._chunks, []
        return chunks

    def finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        error: RequestError | None = None,
        token_ids: list[int] | None = None,
        log_probs: list[float] | None = None,
        top_log_probs: bytes = b"",
    ) -> None:
        """End a sequence: release its slots and its row, and make its last chunk. There is no other way to end."""
        assert sequence.state is not SequenceState.FINISHED, "a sequence ends once"
        uid = sequence.request.uid
        del self._live[uid], self._by_arrival_index[sequence.arrival_index]
        self._queue.remove(sequence)
        if sequence is self._prefilling:
            self._prefilling = None
        self._release(sequence)
        self._chunks.append(sequence.make_chunk(token_ids or [], log_probs or [], reason, error, top_log_probs))
        self._chunks += [copy.make_chunk([], [], reason, error) for copy in sequence.copies]
        for ended in (sequence, *sequence.copies):
            ended.state = SequenceState.FINISHED
            self._requests[reason.value] += 1
            if ended.tree:
                self._num_answers[ended.tree] -= 1
        if sequence.tree and not self._num_answers[sequence.tree]:
            del self._num_answers[sequence.tree]
            self._pool.drop_tree(sequence.tree)

    def fail_all(self, error: RequestError) -> None:
        """End every sequence with the error after a failed step. The batches in flight are never applied."""
        self._in_flight.clear()
        for sequence in list(self._live.values()):
            self.finish(sequence, FinishReason.FAILED, error)
        self._pool.clear_cache()

    def close(self, error: RequestError, drain: bool = False) -> None:
        """Refuse further requests with the error, and end every sequence with it; to drain: those that never ran."""
        self._closed = error
        for sequence in list(self._live.values()):
            if not drain or sequence.state is SequenceState.QUEUED:
                self.finish(sequence, FinishReason.FAILED, error)

    # Observation

    @property
    def has_work(self) -> bool:
        """Whether any request has not ended yet."""
        return bool(self._live)

    @property
    def has_queue(self) -> bool:
        """Whether any request waits for admission."""
        return len(self._queue) > 0

    @property
    def queue_and_limit(self) -> tuple[int, int, str]:
        """The waiting requests, their limit, and, once half of it is reached, the tenant that is refused first."""
        queued, limit = len(self._queue), self._max_queue_size
        return queued, limit, self._queue.longest() if 2 * queued >= limit else ""

    def stats(self) -> EngineStats:
        """A snapshot of the counters."""
        return EngineStats(
            queued_requests=len(self._queue),
            running_requests=len(self._live) - len(self._queue),
            kv_tokens_used=-(-(self._pool.capacity - self._pool.available) // self._groups.count),
            kv_tokens_cached=self._pool.num_evictable,
            kv_tokens_total=self._pool.capacity // self._groups.count,
            preemptions_total=self._preemptions_total,
            prompt_tokens_total=self._prompt_tokens_total,
            generated_tokens_total=self._generated_tokens_total,
            device_seconds_total=self._device_seconds_total,
            launch_seconds_total=self._launch_seconds_total,
            steps_total=self._steps_total.copy(),
            step_tokens_total=self._step_tokens_total.copy(),
            prefix_cache_queries_total=self._prefix_cache_queries_total,
            prefix_cache_hits_total=self._prefix_cache_hits_total,
        )

    @property
    def ended_requests(self) -> dict[str, int]:
        """How many requests have ended, by finish reason; "rejected" are those that submit did not take."""
        return dict(self._requests)

    def check_integrity(self) -> None:
        """Assert that no slot, row or sequence is lost or duplicated, and that the pool suffices. For tests."""
        self._pool.check()
        self._table.check()
        self._queue.check()
        owners = [owner for owner in self._table.owners if owner is not None]
        assert all(self._live.get(owner.request.uid) is owner for owner in owners), "an ended sequence has a row"
        for sequence in self._live.values():
            queued = sequence.state in (SequenceState.QUEUED, SequenceState.PREEMPTED)
            assert queued == (sequence in self._queue), "the queue and a state disagree"
            assert not queued or sequence.row is None, "a queued sequence has a row"
            prefilling = sequence.state is SequenceState.PREFILLING
            assert prefilling == (sequence is self._prefilling), "a prompt is cut but not continued"
        if isinstance(self._policy, ExactAdmission):
            assert self._preemptions_total == 0, "nobody is ever in need"
            peak = self._pool.peak(self._batch_max_tokens)
            assert peak <= self._pool.capacity, f"{peak} token slots will be asked for"

    # Planning

    def _check_admissible(self, sequence: Sequence) -> None:
        request = sequence.request
        if self._closed:
            raise self._closed
        if request.uid in self._live or request.uid in self._num_answers:
            raise RequestError("INVALID_ARG", f"uid {request.uid!r} belongs to a request that has not ended")
        most_held = self._groups.most_held(sequence.max_slots, self._batch_max_tokens)
        if most_held > self._pool.capacity:
            raise RequestError(
                "INVALID_ARG",
                f"the prompt has {sequence.prompt_length} tokens and max_tokens is {request.sampling.max_tokens}; "
                f"that takes {most_held} token slots, and the KV pool has {self._pool.capacity}",
            )
        if len(self._queue) >= self._max_queue_size and not request.urgent:
            full = RequestError("UNAVAILABLE", f"the queue is full ({len(self._queue)} requests)")
            displaced = self._queue.displaced_by(sequence)
            if displaced is None:
                raise full
            self.finish(displaced, FinishReason.REJECTED, full)

    def _expire(self) -> None:
        now = self._clock()
        for sequence in self._deadlines.passed(now):
            error = RequestError("CANCELLED", "the request's deadline has passed")
            self.finish(sequence, FinishReason.CANCELLED, error)
        if self._queue_timeout_s is None:
            return
        late = RequestError("UNAVAILABLE", f"the request waited in the queue for {self._queue_timeout_s:g} seconds")
        for sequence in self._queue.came_before(now - self._queue_timeout_s):
            self.finish(sequence, FinishReason.FAILED, late)

    def _release_planned_out(self) -> None:
        """Release the sequences whose last step is planned, before its token is known.

        The step that reads their slots for the last time runs before any step that reuses the slots. The demand on the
        pool thus equals the forecast of admission, also when steps overlap.
        """
        for sequence in self._table.owners[self._table.planned_out_rows()]:
            self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        """Take the sequence's row and slots back."""
        if sequence.row is not None:
            self._pool.release(sequence.row)
            self._table.release_row(sequence)
            self._queue.end(sequence)
            for step in self._in_flight:
                step.holds_row[step.arrival_indices == sequence.arrival_index] = False

    def _put_back_what_outgrows(self) -> None:
        """Put back the sequences whose next token would be the first beyond `recompute_at`: they prefill anew."""
        if self._recompute_at is not None:
            rows = self._table.decode_rows()
            for sequence in self._table.owners[rows[self._table.cached[rows] == self._recompute_at]]:
                self._put_back(sequence)

    def _is_long(self, sequence: Sequence) -> bool:
        return self._recompute_at is not None and sequence.known_length > self._recompute_at

    def _preempt_until_it_fits(self) -> None:
        """Preempt sequences until the pool has a slot for each decode and for the next chunk of the cut prompt."""
        while self._slots_needed() > self._pool.available:
            tenant, cut = self._queue.most_served(), self._prefilling
            self._preempt(cut if cut and tenant in (None, cut.request.tenant) else self._table.newest(tenant))

    def _slots_needed(self) -> int:
        needed = int(np.count_nonzero(self._table.decoding))
        if self._prefilling is not None:
            left = self._prefilling.known_length - int(self._table.cached[self._prefilling.row])
            needed += min(left, self._batch_max_tokens)
        return needed * self._groups.count

    def _preempt(self, sequence: Sequence) -> None:
        self._put_back(sequence)
        self._preemptions_total += 1

    def _put_back(self, sequence: Sequence) -> None:
        """Release all that a running sequence holds and put it in front of its tenant's queue."""
        row = sequence.row
        assert row is not None, "a sequence that runs has a row"
        sequence.known_ids = self._table.known_token_ids(row).copy()
        sequence.num_due = self._table.num_sampled(row) - sequence.num_generated
        self._release(sequence)
        if sequence is self._prefilling:
            self._prefilling = None
        sequence.state = SequenceState.PREEMPTED
        self._queue.put_back(sequence)

    def _record_length(self, sequence: Sequence, length: int) -> None:
        """Tell the policy the length of an answer that was free to end."""
        if not sequence.request.sampling.ignore_eos:
            self._policy.record_length(length)

    def _plan_prefill(self) -> tuple[list[PromptChunk], list[Admission]]:
        """Plan at most batch_max_tokens of prompts: the one that the last step cut, then those of admitted candidates.

        A prompt that exceeds the rest of the budget is cut and takes all of it, so at most one prompt is cut at a time.
        A candidate leaves the reserve, in rows and slots, to tenants that have nothing running, unless its own has not.
        """
        budget = self._batch_max_tokens
        chunks: list[PromptChunk] = []
        if self._prefilling is not None:
            chunks.append(self._plan_chunk(self._prefilling, budget))
            budget -= chunks[0].num_tokens
        admitted: list[Admission] = []
        gate: Gate | None = None
        while budget > 0 and (sequence := self._queue.next()) is not None and not sequence.num_due:
            rows, slots = self._reserve if self._queue.runs_others(sequence) else (0, 0)
            if self._table.num_free_rows <= rows:
                break
            # The cache has K and V, but not the hidden states that log probabilities come from.
            reusable = sequence.known_ids[:1] if sequence.scores_prompt else sequence.known_ids
            prefix = self._pool.find(reusable, sequence.request.tenant, sequence.tree, self._is_long(sequence))
            # A cut prompt takes the whole budget, so here all running sequences decode.
            if gate is None or prefix.num_sole:
                running = self._table.demand(self._pool.shared_beside(prefix))
                gate = Gate(self._policy, running, self._groups, self._batch_max_tokens)
            planned = min(sequence.known_length, prefix.length + budget)
            num_held = prefix.num_shared + prefix.num_sole
            demand = candidate_demand(sequence, planned, num_held, self._batch_max_tokens)
            if self._groups.num_windowed and planned * self._groups.count > self._pool.available - slots:
                break  # until the next step, prompts hold more than the forecast counts
            if not gate.admits(demand, self._pool.plannable - prefix.num_sole - slots):
                break
            admitted.append(self._admit(sequence, prefix))
            chunks.append(self._plan_chunk(sequence, budget))
            budget -= chunks[-1].num_tokens
        self._prompt_tokens_total += self._batch_max_tokens - budget
        return chunks, admitted

    def _admit(self, sequence: Sequence, prefix: Prefix) -> Admission:
        """Take the sequence out of the queue and give it a row."""
        request = sequence.request
        self._queue.start(sequence, sequence.known_length - prefix.length)
        if sequence.state is SequenceState.QUEUED:
            sequence.queue_seconds = self._clock() - sequence.arrival_time
            sequence.num_cached_tokens = prefix.length
            self._prefix_cache_queries_total += sequence.prompt_length
            self._prefix_cache_hits_total += prefix.length
        copies, sequence.copies = sequence.copies, []
        for copy in copies:
            self._register(copy)
            copy.state = SequenceState.PREEMPTED
            self._queue.put_back(copy)
        slots = prefix.slots()
        row = self._table.take_row(sequence, slots)
        self._pool.hold(row, prefix)
        generated = sequence.known_ids[sequence.prompt_length :].tolist()
        is_recomputed = bool(generated) and self._is_long(sequence)
        return Admission(
            row, request.prompt_ids, request.sampling, tuple(generated), tuple(slots.tolist()), is_recomputed
        )

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
        num_scored = min(length, sequence.prompt_length - 1 - start) if sequence.scores_prompt else 0
        return PromptChunk(row, start, slots, is_last, num_scored, sequence.request.sampling.prompt_logprobs)
