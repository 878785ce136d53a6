# SPDX-License-Identifier: Apache-2.0
"""Requests with structured output before the Router has them: others go on, and each ends once."""

import threading
from pathlib import Path

from lightllm_backend.messages.engine_messages import Submit
from lightllm_backend.request import FinishReason, Request, RequestError, SamplingParams
from lightllm_backend.worker.structured_output import StructuredOutput
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


def test_large_texts_wait_for_each_other_and_small_ones_for_none_of_them() -> None:
    may_go_on = threading.Event()
    compiled = []

    class Compiler:
        def cached(self, _: SamplingParams) -> None:
            return None

        def compile(self, sampling: SamplingParams) -> None:
            if len(sampling.structured_output) > 8192:
                assert may_go_on.wait(10)
            compiled.append(sampling.structured_output[0])
            raise RequestError("INVALID_ARG", "no")

    woken = threading.Semaphore(0)
    structured = StructuredOutput(Compiler(), woken.release)  # type: ignore[arg-type]
    for name, size in (("a", 9000), ("b", 9000), ("c", 9000), ("d", 9)):
        structured.add(Submit(Request(name, (1,), SamplingParams(structured_output=name * size)), 0))
    assert woken.acquire(timeout=10)
    assert [message.request.uid for message, _ in structured.take_done()] == ["d"]
    structured.cancel("b")
    may_go_on.set()
    assert woken.acquire(timeout=10)
    assert woken.acquire(timeout=10)
    assert [message.request.uid for message, _ in structured.take_done()] == ["a", "c"]
    assert compiled == ["d", "a", "c"], "nothing is compiled for a client that has gone"
    structured.close()
