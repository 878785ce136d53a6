# SPDX-License-Identifier: Apache-2.0
"""Requests with structured output before the Router has them: others go on, and each ends once."""

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lightllm_backend.messages.engine_messages import Submit
from lightllm_backend.request import FinishReason, Request, RequestError, SamplingParams
from lightllm_backend.worker.structured_output import Pending, StructuredOutput
from tests.polling import poll
from tests.worker.engine_harness import Answer, counting_engine

ASKED = '{"regex":"a+"}'


def test_nobody_waits_for_what_is_compiled(tmp_path: Path) -> None:
    with counting_engine(tmp_path) as (engine, client):
        engine.may_load_tokenizer.clear()
        held = Answer(client, [1], max_tokens=2, structured_output=ASKED)
        assert Answer(client, [1], max_tokens=2).wait().tokens == [2, 3]
        assert not held.ended.is_set()
        engine.may_load_tokenizer.set()
        assert held.wait().last.finish_reason is FinishReason.REJECTED
        assert "without a tokenizer: numbers are no text" in str(held.last.error)


def test_a_request_may_be_cancelled_while_it_is_compiled(tmp_path: Path) -> None:
    with counting_engine(tmp_path) as (engine, client):
        engine.may_load_tokenizer.clear()
        cancelled, other = (Answer(client, [1], max_tokens=2, structured_output=ASKED) for _ in range(2))
        client.cancel(cancelled.uid)
        assert cancelled.wait().last.finish_reason is FinishReason.CANCELLED
        assert cancelled.last.error is None
        engine.may_load_tokenizer.set()
        assert other.wait().last.finish_reason is FinishReason.REJECTED
        assert len(cancelled.chunks) == 1


def test_all_answers_of_a_cancelled_request_end(tmp_path: Path) -> None:
    with counting_engine(tmp_path) as (engine, client):
        engine.may_load_tokenizer.clear()
        several = Answer(client, [1], max_tokens=2, structured_output=ASKED, n=3)
        for uid in (several.uid, f"{several.uid}/1", f"{several.uid}/2"):
            client.cancel(uid)
        assert poll(lambda: len(several.chunks) == 3)
        assert {chunk.finish_reason for chunk in several.chunks} == {FinishReason.CANCELLED}
        assert len({chunk.uid for chunk in several.chunks}) == 3


def test_as_many_are_compiled_as_may_be_queued(tmp_path: Path) -> None:
    with counting_engine(tmp_path, max_queue_size=2) as (engine, client):
        engine.may_load_tokenizer.clear()
        waiting = [Answer(client, [1], max_tokens=2, structured_output=ASKED) for _ in range(2)]
        refused = Answer(client, [1], max_tokens=2, structured_output=ASKED).wait().last
        assert refused.finish_reason is FinishReason.REJECTED
        assert str(refused.error).startswith("UNAVAILABLE: the queue is full (2 requests whose")
        assert not any(answer.ended.is_set() for answer in waiting)
        assert Answer(client, [1], max_tokens=2).wait().tokens == [2, 3]
        engine.may_load_tokenizer.set()
        assert [answer.wait().last.finish_reason for answer in waiting] == [FinishReason.REJECTED] * 2


class HeldCompiler:
    """Compiles large texts, or all, once it may."""

    def __init__(self, holds_all: bool = False) -> None:
        self.may_go_on = threading.Event()
        self.compiled: list[str] = []
        self._holds_all = holds_all

    def cached(self, _: SamplingParams) -> None:
        return None

    def compile(self, sampling: SamplingParams) -> object:
        if self._holds_all or len(sampling.structured_output) > 8192:
            assert self.may_go_on.wait(60)
        self.compiled.append(sampling.structured_output[0])
        if "x" in sampling.structured_output:
            raise RequestError("INVALID_ARG", "no")
        return sampling.structured_output


class Calls:
    """A Router whose newest batch has these matchers."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.waiting: list[Pending] = []

    def matchers(self, _: object) -> list[Pending | None]:
        return [None if matcher.uid in str(self.calls) else matcher for matcher in self.waiting]

    def follow(self, *given: object) -> None:
        self.calls.append(("follow", *given))

    def refuse(self, *given: object) -> None:
        self.calls.append(("refuse", *given))

    def withdraw(self, *given: object) -> None:
        self.calls.append(("withdraw", *given))


def asking(uid: str, text: str, n: int = 1) -> Submit:
    return Submit(Request(uid, (1,), SamplingParams(structured_output=text, n=n)), 0)


def test_large_texts_wait_for_each_other_and_small_ones_for_none_of_them() -> None:
    compiler, woken, router = HeldCompiler(), threading.Semaphore(0), Calls()
    structured = StructuredOutput(compiler, woken.release)  # type: ignore[arg-type]
    for name, size in (("a", 9000), ("b", 9000), ("c", 9000), ("d", 9)):
        structured.add(asking(name, name * size, n=2))
    assert woken.acquire(timeout=60)
    assert [message.request.uid for message, _ in structured.take_ready(router)] == ["d"]  # type: ignore[arg-type]
    structured.cancel("b")
    compiler.may_go_on.set()
    assert woken.acquire(timeout=60)
    assert woken.acquire(timeout=60)
    assert [message.request.uid for message, _ in structured.take_ready(router)] == ["a", "c"]  # type: ignore[arg-type]
    assert compiler.compiled == ["d", "a", "c"], "nothing is compiled for a client that has gone"
    assert router.calls == []
    structured.close()


def test_a_prompt_runs_while_its_text_is_compiled() -> None:
    compiler, woken, router = HeldCompiler(holds_all=True), threading.Semaphore(0), Calls()
    structured = StructuredOutput(compiler, woken.release)  # type: ignore[arg-type]
    for uid, text in (("kept", "a"), ("wrong", "x"), ("gone", "a"), ("several", "a")):
        structured.add(asking(uid, text, n=2 if uid == "several" else 1))
    submitted = structured.take_ready(router)  # type: ignore[arg-type]
    assert [message.request.uid for message, _ in submitted] == ["kept", "wrong", "gone"]
    assert structured.cancel("gone") == [], "the Router ends it"
    compiler.may_go_on.set()
    for _ in range(3):
        assert woken.acquire(timeout=60)
    assert [message.request.uid for message, _ in structured.take_ready(router)] == ["several"]  # type: ignore[arg-type]
    assert [call[:2] for call in router.calls] == [("follow", "kept"), ("refuse", "wrong")]
    assert len(structured) == 0
    structured.close()


def test_a_step_does_not_wait_for_a_text_that_takes_long() -> None:
    compiler, woken, router = HeldCompiler(holds_all=True), threading.Semaphore(0), Calls()
    structured = StructuredOutput(compiler, woken.release)  # type: ignore[arg-type]
    structured.add(asking("slow", "a"))
    [(_, pending)] = structured.take_ready(router)  # type: ignore[arg-type]
    assert isinstance(pending, Pending)
    router.waiting = [pending]
    masks = np.zeros((1, 4), dtype=np.int32)
    structured.fill(router, None, masks)  # type: ignore[arg-type]
    assert router.calls == [("withdraw", "slow")]
    assert masks.all(), "any token will do, since nobody gets it"
    compiler.may_go_on.set()
    assert woken.acquire(timeout=60)
    [(message, matcher)] = structured.take_ready(router)  # type: ignore[arg-type]
    assert (message.request.uid, matcher) == ("slow", "a")
    structured.close()


class Numbers:
    """A matcher of numbers: any may follow."""

    @staticmethod
    def accept_all(_: Sequence["Numbers"], token_ids: Sequence[int]) -> list[bool]:
        return [False] * len(token_ids)

    def copy(self) -> "Numbers":
        return self


class NumbersCompiler:
    """Has compiled everything already."""

    def cached(self, _: SamplingParams) -> Numbers:
        return Numbers()


class HeldMaskMaker:
    """Makes masks once it may, and fails if told so."""

    def __init__(self, fails: bool = False) -> None:
        self.may_go_on = threading.Event()
        self._fails = fails

    def fill(self, matchers: Sequence[Any], masks: NDArray[np.int32]) -> None:
        assert self.may_go_on.wait(60)
        if self._fails:
            raise ValueError("no masks")
        assert len(matchers) == len(masks)
        masks[:] = -1


def with_masks_of(maker: HeldMaskMaker) -> StructuredOutput:
    structured = StructuredOutput(NumbersCompiler(), lambda: None)  # type: ignore[arg-type]
    structured._mask_maker = maker  # type: ignore[assignment]
    return structured


@pytest.mark.parametrize("is_gated", [True, False])
def test_what_is_launched_while_masks_are_made(tmp_path: Path, is_gated: bool) -> None:
    maker = HeldMaskMaker()
    with counting_engine(tmp_path, overlap=1, structured=with_masks_of(maker), is_gated=is_gated) as (engine, client):
        answers = [Answer(client, [first], max_tokens=5, structured_output=ASKED) for first in (1, 100)]
        assert poll(lambda: engine.runner.num_launched == 1 + is_gated)
        time.sleep(0.05)
        assert engine.runner.num_launched == 1 + is_gated, "the next step waits for the tokens of the step before"
        assert not any(answer.chunks for answer in answers)
        maker.may_go_on.set()
        assert [answer.wait().tokens for answer in answers] == [[2, 3, 4, 5, 6], [101, 102, 103, 104, 105]]


@pytest.mark.parametrize("is_gated", [True, False])
def test_masks_that_fail_end_the_engine(tmp_path: Path, is_gated: bool) -> None:
    maker = HeldMaskMaker(fails=True)
    with counting_engine(tmp_path, overlap=1, structured=with_masks_of(maker), is_gated=is_gated) as (engine, client):
        answer = Answer(client, [1], max_tokens=5, structured_output=ASKED)
        maker.may_go_on.set()
        assert "the engine failed: ValueError: no masks" in str(answer.wait().last.error)
        assert poll(lambda: isinstance(engine.error, ValueError))
