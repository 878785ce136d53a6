# SPDX-License-Identifier: Apache-2.0
"""EngineClient, EngineServer, loop and Router together, over a socket: each request ends exactly once."""

import logging
import threading
import time
from dataclasses import replace
from pathlib import Path

import msgpack
import pytest

from lightllm_backend.launch.closing import EngineCloser, Progress
from lightllm_backend.launch.health import why_unready
from lightllm_backend.messages.channel import Channel
from lightllm_backend.messages.engine_messages import EngineInfo, Ready, Submit, Tokens
from lightllm_backend.messages.vitals import read_vitals
from lightllm_backend.request import FinishReason, Request, RequestError, SamplingParams
from lightllm_backend.router.statistics import EngineStats
from lightllm_backend.worker.statistics_log import StatisticsLog
from tests.polling import poll
from tests.worker.engine_harness import (
    EOS_ID,
    INFO,
    Answer,
    CountingEngine,
    EngineClient,
    counting_engine,
)


@pytest.mark.parametrize("overlap", [0, 1])
def test_tokens_come_a_chunk_a_step_and_the_last_says_why(tmp_path: Path, overlap: int) -> None:
    with counting_engine(tmp_path, overlap) as (engine, client):
        assert client.wait_ready() == INFO
        answer = Answer(client, [10, 20], max_tokens=5).wait()
        assert answer.tokens == [21, 22, 23, 24, 25]
        assert len(answer.chunks) == 5
        assert answer.last.finish_reason is FinishReason.LENGTH
        assert {chunk.num_prompt_tokens for chunk in answer.chunks} == {2}
        assert [chunk.queue_seconds is None for chunk in answer.chunks] == [False, True, True, True, True]
        assert engine.runner.most_in_flight == overlap + 1
        assert engine.router.stats().kv_tokens_used == 0


def test_the_tokens_of_a_step_travel_as_arrays(tmp_path: Path) -> None:
    with counting_engine(tmp_path) as (engine, client):
        channel = Channel.connect(str(tmp_path / "engine"))
        assert channel.receive() == Ready(INFO)
        engine.runner.gate.clear()
        Answer(client, [1], max_tokens=2)
        assert poll(lambda: engine.router.stats().running_requests == 1)
        for number in (7, 2**33):
            request = Request(f"r{number}", (number % 100,), SamplingParams(max_tokens=4))
            channel.send(Submit(request, number))
        engine.runner.gate.set()
        given: dict[int, list[int]] = {7: [], 2**33: []}
        num_chunks = num_steps = 0
        while num_chunks < 4:
            message = channel.receive()
            if isinstance(message, Tokens):
                num_steps += 1
                num_chunks += len(message.chunks)
                for number, token_id in zip(message.numbers.tolist(), message.token_ids.tolist(), strict=True):
                    given[number].append(token_id)
        channel.close()
        # The first and the last token of each come in a chunk.
        assert given == {7: [9, 10], 2**33: [94, 95]}
        assert num_steps == 4


@pytest.mark.parametrize("overlap", [0, 1])
def test_an_eos_ends_also_where_it_is_noticed_late(tmp_path: Path, overlap: int) -> None:
    with counting_engine(tmp_path, overlap) as (_, client):
        answer = Answer(client, [EOS_ID - 3], max_tokens=50).wait()
        assert answer.tokens == [EOS_ID - 2, EOS_ID - 1, EOS_ID]
        assert answer.last.finish_reason is FinishReason.STOP


@pytest.mark.parametrize("overlap", [0, 1])
def test_many_requests_of_two_clients_share_the_engine(tmp_path: Path, overlap: int) -> None:
    with counting_engine(tmp_path, overlap) as (_, first):
        second = EngineClient(str(tmp_path / "engine"))
        second.wait_ready(10)
        answers = {
            number: Answer((first, second)[number % 2], [number] * (1 + number % 7), max_tokens=1 + number % 9)
            for number in range(40)
        }
        for number, answer in answers.items():
            assert answer.wait().tokens == list(range(number + 1, number + 2 + number % 9))
        second.close()


def test_log_probs_come_where_they_were_asked_for(tmp_path: Path) -> None:
    with counting_engine(tmp_path) as (_, client):
        asked = Answer(client, [4], max_tokens=2, return_log_probs=True).wait()
        assert [chunk.log_probs for chunk in asked.chunks] == [[-5.0], [-6.0]]
        assert [chunk.log_probs for chunk in Answer(client, [4], max_tokens=2).wait().chunks] == [[], []]


def test_requests_join_and_leave_between_steps(tmp_path: Path) -> None:
    with counting_engine(tmp_path) as (_, client):
        long = Answer(client, [1], max_tokens=300)
        long.next()
        assert Answer(client, [50], max_tokens=2).wait().tokens == [51, 52]
        assert not long.ended.is_set() or len(long.chunks) == 300
        assert long.wait().tokens == list(range(2, 302))


def test_what_can_never_run_is_refused_at_once(tmp_path: Path) -> None:
    with counting_engine(tmp_path) as (_, client):
        for prompt, max_tokens, said in [
            ([1] * 51, 1, "at most 50 prompt tokens"),
            ([1] * 51, -1, "max_tokens is -1; allowed: at most 50 prompt tokens"),
            ([1], 400, "at most 400 in all"),
            ([1000], 1, "input_ids holds 1000"),
            ([], 1, "no tokens"),
        ]:
            with pytest.raises(RequestError, match=said) as refusal:
                Answer(client, prompt, max_tokens=max_tokens)
            assert refusal.value.code == "INVALID_ARG"
        assert Answer(client, [1], max_tokens=1).wait().tokens == [2]


def test_a_full_queue_refuses_with_one_chunk(tmp_path: Path) -> None:
    with counting_engine(tmp_path, running_max_req_size=1, max_queue_size=1) as (engine, client):
        engine.runner.gate.clear()
        running = Answer(client, [1], max_tokens=2)
        assert poll(lambda: engine.router.stats().running_requests >= 1)
        assert poll(lambda: engine.load.read() == (0, 1)), "the door of the first step reads this"
        waiting = [Answer(client, [1], max_tokens=2) for _ in range(3)]
        engine.runner.gate.set()
        ends = [answer.wait().last for answer in waiting]
        refused = [end.error for end in ends if end.error]
        assert len(refused) == 2
        assert {str(error) for error in refused} == {"UNAVAILABLE: the queue is full (1 requests)"}
        assert {end.finish_reason for end in ends if end.error} == {FinishReason.REJECTED}, "it counts as rejected"
        assert running.wait().tokens == [2, 3]


def test_cancel_and_stop_end_a_request(tmp_path: Path) -> None:
    with counting_engine(tmp_path) as (engine, client):
        for end, reason in ((client.cancel, FinishReason.CANCELLED), (client.stop, FinishReason.STOP)):
            engine.runner.gate.clear()
            answer = Answer(client, [1], max_tokens=300)
            end(answer.uid)
            engine.runner.gate.set()
            assert answer.wait().last.finish_reason is reason
            assert len(answer.tokens) < 300
            assert answer.last.error is None
        client.cancel("never heard of")
        assert poll(lambda: engine.router.stats().kv_tokens_used == 0)


def test_a_queued_request_can_be_cancelled(tmp_path: Path) -> None:
    with counting_engine(tmp_path, running_max_req_size=1) as (_, client):
        running = Answer(client, [1], max_tokens=390)
        queued = Answer(client, [1], max_tokens=5)
        client.cancel(queued.uid)
        client.cancel(running.uid)
        assert queued.wait().last.finish_reason is FinishReason.CANCELLED
        assert running.wait().last.finish_reason is FinishReason.CANCELLED


def test_a_deadline_ends_with_an_error(tmp_path: Path) -> None:
    with counting_engine(tmp_path) as (_, client):
        answer = Answer(client, [1], deadline=time.monotonic() - 1, max_tokens=300).wait()
        assert answer.last.error is not None
        assert answer.last.error.code == "CANCELLED"


def test_a_step_that_fails_ends_every_request_once_and_the_worker(tmp_path: Path) -> None:
    with counting_engine(tmp_path, running_max_req_size=2) as (engine, client):
        engine.runner.gate.clear()
        answers = [Answer(client, [1], max_tokens=5) for _ in range(4)]
        assert poll(lambda: engine.router.stats().running_requests >= 1)
        engine.runner.failure = RuntimeError("the device is on fire")
        engine.runner.gate.set()
        errors = [answer.wait().last.error for answer in answers]
        assert all(error is not None and error.code in ("INTERNAL", "UNAVAILABLE") for error in errors)
        assert str(errors[0]) == "INTERNAL: the engine failed: RuntimeError: the device is on fire"
        assert poll(lambda: engine.error is not None)
        assert engine.error is engine.runner.failure


def test_requests_of_a_worker_that_dies_end_and_a_new_worker_is_found(tmp_path: Path) -> None:
    told: list[EngineInfo | None] = []
    address = str(tmp_path / "engine")
    first = CountingEngine(address)
    client = EngineClient(address, on_up=told.append)
    client.wait_ready(10)
    first.runner.gate.clear()
    answers = [Answer(client, [1], max_tokens=5) for _ in range(3)]
    assert poll(lambda: first.router.stats().running_requests + first.router.stats().queued_requests > 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(first.server, "send", lambda output: None)  # a dead worker says nothing
        first.stop()
    for answer in answers:
        error = answer.wait().last.error
        assert error is not None
        assert str(error) == "UNAVAILABLE: the engine stopped while the request was running; try again"
    assert not client.up
    with pytest.raises(RequestError, match="UNAVAILABLE: the engine is not up"):
        Answer(client, [1], max_tokens=1)
    second = CountingEngine(address)
    client.wait_ready(10)
    assert Answer(client, [7], max_tokens=2).wait().tokens == [8, 9]
    assert told == [INFO, None, INFO]
    second.stop()
    client.close()


def test_a_message_that_cannot_be_read_ends_the_requests_and_the_client_connects_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with counting_engine(tmp_path) as (engine, client):
        engine.runner.gate.clear()
        answer = Answer(client, [1], max_tokens=5)
        assert poll(lambda: engine.router.stats().running_requests == 1)
        [channel] = engine.server._clients
        channel.send_frame(msgpack.packb(("Tokens", ["no array"])))
        assert "the engine stopped while the request was running" in str(answer.wait().last.error)
        assert "the engine's messages cannot be read" in caplog.text
        engine.runner.gate.set()
        client.wait_ready(10)
        assert Answer(client, [7], max_tokens=2).wait().tokens == [8, 9]


def test_a_client_may_close_the_engine(tmp_path: Path) -> None:
    with counting_engine(tmp_path) as (engine, client):
        other = EngineClient(str(tmp_path / "engine"))
        other.wait_ready(10)
        engine.runner.gate.clear()
        answers = [Answer(client, [1], max_tokens=5), Answer(other, [1], max_tokens=5)]
        assert poll(
            lambda: engine.router.stats().running_requests > 0
        )  # the step that waits at the gate may have only one
        closer = EngineCloser(tmp_path)
        closer.close_engine("the server is stopped: generation is dead")
        engine.runner.gate.set()
        for answer in [*answers, Answer(client, [1], max_tokens=5)]:
            assert str(answer.wait().last.error) == "UNAVAILABLE: the server is stopped: generation is dead"
        closer.disconnect()
        other.close()


def test_a_drained_engine_refuses_requests_and_finishes_those_that_run(tmp_path: Path) -> None:
    with counting_engine(tmp_path, running_max_req_size=1) as (engine, client):
        engine.runner.gate.clear()
        running = Answer(client, [1], max_tokens=5)
        assert poll(lambda: engine.router.stats().running_requests == 1)
        queued = Answer(client, [1], max_tokens=5)
        closer = EngineCloser(tmp_path)
        closer.close_engine("the server is shutting down", drain=True)
        engine.runner.gate.set()
        assert str(queued.wait().last.error) == "UNAVAILABLE: the server is shutting down"
        assert "the server is being stopped and takes no more requests" in str(why_unready(tmp_path))
        assert running.wait().tokens == [2, 3, 4, 5, 6]
        assert str(Answer(client, [1], max_tokens=5).wait().last.error) == "UNAVAILABLE: the server is shutting down"
        progress = Progress(tmp_path)
        progress.look()
        progress.look()
        assert progress.engine_rests
        assert progress.num_open == 0
        closer.disconnect()


def test_an_engine_that_is_replaced_is_closed_again(tmp_path: Path) -> None:
    closer = EngineCloser(tmp_path)
    closer.close_engine("nobody is there", drain=True)
    for _ in range(2):
        with counting_engine(tmp_path) as (_, client):
            closer.close_engine("the server is shutting down", drain=True)
            assert poll(lambda: "shutting down" in str(Answer(client, [1], max_tokens=5).wait().last.error))
    closer.disconnect()


def test_the_loop_publishes_its_progress(tmp_path: Path) -> None:
    with counting_engine(tmp_path) as (engine, client):
        engine.runner.gate.clear()
        answer = Answer(client, [1], max_tokens=3)
        assert poll(lambda: read_vitals(tmp_path)[0].busy_since > 0), "in the midst of a step"
        [stuck] = read_vitals(tmp_path)
        assert stuck.role == "worker-0"
        assert stuck.busy_since <= time.monotonic()
        engine.runner.gate.set()
        answer.wait()
        assert poll(lambda: read_vitals(tmp_path)[0].busy_since == 0)
        assert read_vitals(tmp_path)[0].taken - stuck.taken == 3, "results"


def test_requests_of_a_client_that_dies_are_cancelled(tmp_path: Path) -> None:
    with counting_engine(tmp_path, running_max_req_size=2) as (engine, client):
        doomed = EngineClient(str(tmp_path / "engine"))
        doomed.wait_ready(10)
        engine.runner.gate.clear()
        answers = [Answer(doomed, [1], max_tokens=300) for _ in range(4)]
        assert poll(lambda: engine.router.stats().running_requests > 0)
        doomed.close()
        engine.runner.gate.set()
        assert poll(lambda: not engine.router.has_work)
        assert engine.router.stats().kv_tokens_used == 0
        assert engine.router.ended_requests["cancelled"] == 4
        assert all(answer.wait().last.error is not None for answer in answers)
        assert Answer(client, [1], max_tokens=2).wait().tokens == [2, 3]


def test_no_worker_is_unavailable(tmp_path: Path) -> None:
    client = EngineClient(str(tmp_path / "nobody"))
    with pytest.raises(RequestError, match="UNAVAILABLE"):
        client.wait_ready(0.01)
    client.close()


def test_uids_of_two_clients_differ(tmp_path: Path) -> None:
    clients = [EngineClient(str(tmp_path / "nobody")) for _ in range(2)]
    uids = {client.new_uid() for client in clients for _ in range(10)}
    assert len(uids) == 20
    for client in clients:
        client.close()


def test_statistics_reach_the_clients_and_come_to_rest(tmp_path: Path) -> None:
    address = str(tmp_path / "engine")
    engine = CountingEngine(address)
    told: list[EngineStats] = []
    client = EngineClient(address, on_stats=told.append)
    client.wait_ready(10)
    Answer(client, [1, 2, 3], max_tokens=4).wait()
    assert poll(lambda: told and told[-1].generated_tokens_total == 4)
    assert told[-1] == EngineStats(
        kv_tokens_cached=6, kv_tokens_total=500, prompt_tokens_total=3, generated_tokens_total=4,
        steps_total={"prefill": 1, "decode": 3, "mixed": 0}, step_tokens_total={"prefill": 3, "decode": 3, "mixed": 0},
        prefix_cache_queries_total=3,
    )  # fmt: skip
    engine.stop()
    client.close()


def test_the_loop_ends_with_its_owner(tmp_path: Path) -> None:
    engine = CountingEngine(str(tmp_path / "engine"))
    engine.stop()  # asserts that the thread ends
    assert engine.error is None


def test_a_client_may_be_closed_while_it_waits_for_a_worker(tmp_path: Path) -> None:
    client = EngineClient(str(tmp_path / "nobody"))
    closer = threading.Thread(target=client.close)
    closer.start()
    closer.join(60)
    assert not closer.is_alive()


def test_the_statistics_log_speaks_when_there_is_something_to_tell(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lightllm.worker")
    statistics = StatisticsLog(interval=0.01)
    time.sleep(0.02)
    statistics.update(EngineStats(running_requests=2, kv_tokens_used=50, kv_tokens_total=200, generated_tokens_total=9))
    assert "2 running, 0 queued, 50 of 200 KV tokens used (25 %)" in caplog.text
    said = len(caplog.records)
    statistics.update(EngineStats(kv_tokens_total=200))  # too soon
    assert len(caplog.records) == said
    silent = StatisticsLog(interval=0)
    time.sleep(0.02)
    silent.update(EngineStats(running_requests=1, kv_tokens_total=200))
    assert len(caplog.records) == said


def test_the_statistics_log_is_silent_about_probes(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "lightllm.worker")
    now = time.monotonic()
    statistics = StatisticsLog(interval=10)
    monkeypatch.setattr(time, "monotonic", lambda: now + 11)
    probed = EngineStats(kv_tokens_total=200, prompt_tokens_total=2, generated_tokens_total=2)
    statistics.update(probed)
    assert not caplog.records
    monkeypatch.setattr(time, "monotonic", lambda: now + 22)
    statistics.update(replace(probed, generated_tokens_total=40))
    assert "0 running, 0 queued" in caplog.text
