# SPDX-License-Identifier: Apache-2.0
"""THE loop: what drives the GPU, step by step."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from lightllm_backend.messages.channel import ChannelClosed
from lightllm_backend.messages.engine_load import EngineLoad
from lightllm_backend.messages.engine_messages import ENGINE_STOPPED, Cancel, CloseEngine, Stop, Submit
from lightllm_backend.messages.vitals import Vitals
from lightllm_backend.request import FinishReason, RequestError, TokenChunk
from lightllm_backend.router.batch import Batch, RouterOutput
from lightllm_backend.router.router import Router
from lightllm_backend.router.sequence import TextMatcher
from lightllm_backend.worker.batch_channel import BatchReceiver, BatchSender
from lightllm_backend.worker.launch_timer import LaunchTimer
from lightllm_backend.worker.server import STATS_SECONDS, EngineServer
from lightllm_backend.worker.statistics_log import StatisticsLog

if TYPE_CHECKING:
    from concurrent.futures import Future

    from lightllm_backend.runner.model_runner import ModelRunner, PendingStep
    from lightllm_backend.worker.structured_output import StructuredOutput

# How often the loop checks whether the GPU is done while it waits for new requests. A check costs some microseconds.
POLL_SECONDS = 0.5e-3


class _Launched(NamedTuple):
    """A step in flight. masks_made: done once another thread has made its masks; None: no other thread does."""

    batch: Batch
    step: PendingStep
    masks_made: Future[None] | None = None


def run(
    server: EngineServer, router: Router, followers: BatchSender, runner: ModelRunner, statistics: StatisticsLog,
    vitals: Vitals, load: EngineLoad, structured: StructuredOutput, clock: Callable[[], float] = time.monotonic,
) -> None:  # fmt: skip
    """THE loop of rank 0: receive, schedule, run, apply, emit; until the process that owns this worker is gone.

    Up to `runner.overlap` steps are in flight while the next one is planned, as late as that does not idle the GPU. If
    a step fails, every request ends with an error and the failure is raised: this process is broken, and its supervisor
    starts another.
    """
    in_flight: deque[_Launched] = deque()
    timer = LaunchTimer(clock)

    def take_result() -> None:
        done, step, masks_made = in_flight.popleft()
        if masks_made is not None:
            masks_made.result()  # raises what has gone wrong there
        result = step.result()
        vitals.took()
        timer.finished()
        server.send(router.apply(done, result))

    try:
        while server.open:
            idle = not router.has_work and not in_flight
            refused = receive(server, router, load, vitals, structured, timeout=STATS_SECONDS if idle else 0.0)
            while (spare := timer.spare_seconds()) > 0 and not in_flight[0].step.is_done():
                refused += receive(server, router, load, vitals, structured, timeout=min(spare, POLL_SECONDS))
            timer.planning()
            batch = router.next_batch()
            load.publish(*router.queue_and_limit)
            vitals.turn(busy=batch is not None or bool(in_flight))
            if batch is not None:
                followers.send(batch)
                step = runner.launch(batch)
                timer.launched(batch, all_admitted=not router.has_queue)
                masks_made = None
                if step.masks is not None:
                    # They depend on the tokens of all steps before, while this one's forward already runs.
                    while in_flight:
                        take_result()
                    masks_made = _make_masks(structured, router, followers, runner, _Launched(batch, step))
                in_flight.append(_Launched(batch, step, masks_made))
            while in_flight and (len(in_flight) > runner.overlap or batch is None):
                take_result()
            server.send(RouterOutput.of_chunks(refused + router.drain_finished()))
            stats = router.stats()
            server.publish(stats)
            statistics.update(stats)
    except Exception as error:
        failure = RequestError("INTERNAL", f"the engine failed: {type(error).__name__}: {error}")
        router.fail_all(ENGINE_STOPPED if followers.has_lost_one() else failure)
        runner.release_all()
        server.send(RouterOutput.of_chunks(router.drain_finished()))
        raise


def _make_masks(
    structured: StructuredOutput, router: Router, followers: BatchSender, runner: ModelRunner, newest: _Launched
) -> Future[None] | None:
    """Make the masks that the newest step waits for; on another thread if the step is launched already, behind a gate.

    Raises what goes wrong, or the other thread's Future does.
    """
    step, masks = newest.step, newest.step.masks
    assert masks is not None

    def release() -> None:
        followers.send_masks(masks)
        runner.release(step)

    if runner.is_gated:
        return structured.begin_to_fill(router, newest.batch, masks, release)
    structured.fill(router, newest.batch, masks)
    release()
    return None


def follow(batches: BatchReceiver, runner: ModelRunner) -> None:
    """The loop of the other ranks: run each batch that rank 0 sends, until rank 0 is gone.

    It does not wait for the GPU: rank 0 waits before it plans further steps.
    """
    try:
        while True:
            step = runner.launch(batches.receive())
            if step.masks is not None:
                batches.receive_masks(step.masks)
                runner.release(step)
    except ChannelClosed:
        pass


def receive(
    server: EngineServer, router: Router, load: EngineLoad, vitals: Vitals, structured: StructuredOutput, timeout: float
) -> list[TokenChunk]:
    """Hand the messages that have come to the Router; return the last chunks of requests that never reach it.

    Requests with structured output may come later, when that is compiled.
    """
    last_chunks: list[TokenChunk] = []

    def submit(message: Submit, matcher: TextMatcher | RequestError | None = None) -> None:
        try:
            if isinstance(matcher, RequestError):
                raise matcher
            router.submit(message.request, message.number, matcher)
        except RequestError as error:
            uids = message.request.uids
            last_chunks.extend(TokenChunk(uid, [], [], FinishReason.REJECTED, error=error) for uid in uids)

    for message in server.receive(timeout):
        if isinstance(message, Submit):
            load.took(message.request.ticket)
            if not message.request.sampling.structured_output:
                submit(message)
            elif len(structured) >= router.queue_and_limit[1]:
                why = f"the queue is full ({len(structured)} requests whose structured output is compiled)"
                submit(message, RequestError("UNAVAILABLE", why))
            else:
                structured.add(message)
        elif isinstance(message, Cancel):
            router.cancel(message.uid)
            last_chunks += structured.cancel(message.uid)
        elif isinstance(message, Stop):
            router.stop(message.uid)
        elif isinstance(message, CloseEngine):
            router.close(RequestError("UNAVAILABLE", message.reason), message.drain)
            vitals.refuse_requests()
    for message, matcher in structured.take_ready(router):
        submit(message, matcher)
    return last_chunks
