# SPDX-License-Identifier: Apache-2.0
"""A runner whose output can be computed by hand, and the engine's loop around it with steps that overlap."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from lightllm_backend.kv_pool.layer_groups import ONE_GROUP, LayerGroups
from lightllm_backend.request import MAX_ANSWERS, FinishReason, Request, SamplingParams, TokenChunk
from lightllm_backend.router.batch import Batch, RouterOutput, StepResult
from lightllm_backend.router.router import Router

VOCABULARY = 11
UNWRITTEN = -1


def next_token(context: Iterable[int]) -> int:
    """Depends on every token of the context and on where it stands."""
    return sum((position + 1) * (token + 3) for position, token in enumerate(context)) * 7 // 3 % VOCABULARY


def expected_answer(request: Request, eos_ids: frozenset[int]) -> tuple[list[int], FinishReason]:
    """What a request gets that is alone in the world."""
    sampling = request.sampling
    answer: list[int] = []
    while len(answer) < sampling.max_tokens:
        answer.append(next_token([*request.prompt_ids, *answer]))
        if answer[-1] in sampling.ending_ids(tuple(eos_ids)) and len(answer) > sampling.min_tokens:
            return answer, FinishReason.STOP
    return answer, FinishReason.LENGTH


class FakeRunner:
    """Keeps tokens where a real one keeps K and V, so that a slot or row in wrong hands changes the answer.

    With layer groups, each of them must have what its queries see.
    """

    def __init__(
        self, capacity: int, num_rows: int, recompute_at: int | None = None, groups: LayerGroups = ONE_GROUP
    ) -> None:
        """`recompute_at`: K of longer sequences turns otherwise, and a step must not see K of both kinds."""
        self.recompute_at = recompute_at
        self.turning_lengths = np.zeros(num_rows, dtype=np.int64)
        self.is_long = np.zeros(capacity, dtype=np.bool_)
        self.groups = groups
        self.pool = np.full(capacity, UNWRITTEN, dtype=np.int64)
        longest = max(capacity, 100) + 1  # with a window, more tokens than slots
        self.slot_of = np.full((self.groups.count, num_rows, longest), UNWRITTEN, dtype=np.int64)
        self.token_of = np.full((num_rows, longest), UNWRITTEN, dtype=np.int64)

    def step(self, batch: Batch) -> StepResult:
        check_shape(batch)
        for admission in batch.admitted:
            self.slot_of[:, admission.row] = UNWRITTEN
            self.token_of[admission.row] = UNWRITTEN
            known = admission.prompt_ids + admission.generated_ids
            self.token_of[admission.row, : len(known)] = known
            self.slot_of[0, admission.row, : len(admission.cached_slots)] = admission.cached_slots
            self.turning_lengths[admission.row] = len(known) if admission.is_recomputed else len(admission.prompt_ids)
        spans = list(zip(batch.rows.tolist(), batch.starts.tolist(), batch.lengths.tolist(), strict=True))
        offset = 0
        for row, start, length in spans:
            slots = batch.slots[:, offset : offset + length]
            offset += length
            self.slot_of[:, row, start : start + length] = slots
            self.pool[slots] = self.token_of[row, start : start + length]
            if self.recompute_at is not None:
                lengths = np.maximum(self.turning_lengths[row], np.arange(start, start + length) + 1)
                self.is_long[slots] = lengths > self.recompute_at
        token_ids = []
        for (row, start, length), samples in zip(spans, batch.samples.tolist(), strict=True):
            context = self._context(row, start, length)
            if samples:
                if self.recompute_at is not None:
                    is_long = start + length > self.recompute_at
                    seen = np.concatenate(self._seen(row, start, length))
                    assert (self.is_long[seen] == is_long).all(), "K of both kinds"
                token_ids.append(next_token(context.tolist()))
                self.token_of[row, start + length] = token_ids[-1]
        log_probs = np.array([-token - 0.5 for token in token_ids], dtype=np.float32)
        return StepResult(np.array(token_ids, dtype=np.int32), log_probs)

    def spoil(self, slots: NDArray[np.int32]) -> None:
        """Overwrite what is in slots that become free."""
        self.pool[slots] = UNWRITTEN

    def _context(self, row: int, start: int, length: int) -> NDArray[np.int64]:
        """What the row's last query sees, from a group without a window if there is one."""
        contexts, tokens = [self.pool[slots] for slots in self._seen(row, start, length)], self.token_of[row]
        for context in contexts[self.groups.num_full :]:
            expected = tokens[start + length - len(context) : start + length]
            assert np.array_equal(context, expected), "a query sees what is not its own"
        whole = contexts[: self.groups.num_full] or [tokens[: start + length]]
        assert all(np.array_equal(whole[0], other) for other in whole[1:]), "groups differ"
        return whole[0]

    def _seen(self, row: int, start: int, length: int) -> list[NDArray[np.int64]]:
        """The slots, in each group, of what the queries of these tokens see."""
        groups = self.groups
        firsts = [0] * groups.num_full + [max(0, start + 1 - groups.window)] * groups.num_windowed
        return [slots[row, first : start + length] for slots, first in zip(self.slot_of, firsts, strict=True)]


def check_shape(batch: Batch) -> None:
    """What every batch must keep, whatever is in it."""
    assert len(batch.rows) == len(batch.starts) == len(batch.lengths) == len(batch.samples) > 0
    assert {array.dtype for array in (batch.rows, batch.starts, batch.lengths, batch.slots)} == {np.dtype(np.int32)}
    assert batch.samples.dtype == np.bool_
    assert len(set(batch.rows.tolist())) == len(batch.rows)
    assert len(set(batch.slots.ravel().tolist())) == batch.slots.size
    assert batch.slots.shape[1] == batch.lengths.sum()
    assert (batch.lengths >= 1).all()
    assert (batch.lengths[: batch.num_decodes] == 1).all()
    assert batch.samples[: batch.num_decodes].all()
    starts = dict(zip(batch.rows.tolist(), batch.starts.tolist(), strict=True))
    assert all(starts[admission.row] == len(admission.cached_slots) for admission in batch.admitted)
    assert {row for row, start in starts.items() if start == 0} <= {admission.row for admission in batch.admitted}


class EngineLoop:
    """The worker's loop: `depth` batches are planned before the oldest is applied. Collects each request's chunks."""

    def __init__(self, router: Router, runner: FakeRunner, depth: int) -> None:
        self.router = router
        self.runner = runner
        self.depth = depth
        self.chunks: dict[str, list[TokenChunk]] = defaultdict(list)
        self.batches: list[Batch] = []
        self.most_used = 0  # token slots
        self._in_flight: deque[tuple[Batch, StepResult]] = deque()

    def submit(self, request: Request) -> None:
        submit(self.router, request)

    def step(self) -> None:
        batch = self.router.next_batch()
        self.most_used = max(self.most_used, self.router.stats().kv_tokens_used)
        self.router.check_integrity()
        if batch is not None:
            self.batches.append(batch)
            self._in_flight.append((batch, self.runner.step(batch)))
        if self._in_flight and (batch is None or len(self._in_flight) > self.depth):
            self.collect(as_chunks(self.router.apply(*self._in_flight.popleft())))
        else:
            self.collect(self.router.drain_finished())
        self.router.check_integrity()

    def run(self) -> None:
        for _ in range(1_000):
            if not self.router.has_work and not self._in_flight:
                return
            self.step()
        raise AssertionError("the engine does not come to an end")

    def collect(self, chunks: list[TokenChunk]) -> None:
        for chunk in chunks:
            earlier = self.chunks[chunk.uid]
            assert not earlier or earlier[-1].finish_reason is None, "a chunk after the last one"
            assert chunk.token_ids or chunk.finish_reason is not None, "an empty chunk that is not the last"
            earlier.append(chunk)

    def answer(self, uid: str) -> tuple[list[int], FinishReason | None]:
        chunks = self.chunks[uid]
        return [token for chunk in chunks for token in chunk.token_ids], chunks[-1].finish_reason


def submit(router: Router, request: Request) -> None:
    """With a handle that is the uid, of at most seven bytes, and the number of the answer, in another form."""
    router.submit(request, int.from_bytes(request.uid.encode(), "big") * MAX_ANSWERS)


def as_chunks(output: RouterOutput) -> list[TokenChunk]:
    """All that a step gives to clients, whichever way."""
    pairs = zip(output.handles.tolist(), output.token_ids.tolist(), strict=True)
    uids_and_tokens = [(_uid(handle), token) for handle, token in pairs]
    assert not {uid for uid, _ in uids_and_tokens} & {chunk.uid for chunk in output.chunks}
    return [TokenChunk(uid, [token], []) for uid, token in uids_and_tokens] + output.chunks


def _uid(handle: int) -> str:
    name, number = divmod(handle, MAX_ANSWERS)
    uid = name.to_bytes(8, "big").lstrip(b"\0").decode()
    return f"{uid}/{number}" if number else uid


def make_request(
    uid: str, prompt_length: int, max_tokens: int = 4, deadline: float | None = None, family: int | None = None,
    tenant: str = "", priority: int = 0, **sampling,
) -> Request:  # fmt: skip
    """A request whose prompt differs from that of most other uids; within a family, one begins with another."""
    first = sum(uid.encode()) if family is None else family
    prompt = tuple((first + position * position) % VOCABULARY for position in range(prompt_length))
    sampling_params = SamplingParams(max_tokens=max_tokens, **sampling)
    return Request(uid, prompt, sampling_params, deadline, tenant=tenant, priority=priority)
