# SPDX-License-Identifier: Apache-2.0
"""A worker: the process that holds a GPU, or a share of the CPU's cores; one for each tensor-parallel rank.

Rank 0's has the Router and the step loop, which meet nowhere else. The others, the followers, run the batches that it
sends them (see batch_channel.py); all sample the same tokens.

Run by the EngineSupervisor as `python -m lightllm_backend.worker.main SOCKET RANK`. Its settings come from the
environment, its standard output tells the supervisor how it is (see supervisor.py), its log goes to standard error.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from lightllm_backend.config import ConfigError, EngineConfig
from lightllm_backend.generation.worker_group import rendezvous_file
from lightllm_backend.messages.channel import (
    CANCEL,
    CLOSE,
    STOP,
    SUBMIT,
    ChannelClosed,
    EngineInfo,
    EngineStats,
    unpack_request,
)
from lightllm_backend.messages.vitals import Vitals
from lightllm_backend.models.errors import ModelError
from lightllm_backend.request import FinishReason, RequestError, TokenChunk
from lightllm_backend.router.admission import ExactAdmission
from lightllm_backend.router.batch import Batch, StepOutput
from lightllm_backend.router.past_future import PastFutureAdmission
from lightllm_backend.router.router import Router
from lightllm_backend.worker.batch_channel import BatchReceiver, BatchSender
from lightllm_backend.worker.launch_timer import LaunchTimer
from lightllm_backend.worker.server import STATS_SECONDS, EngineServer

if TYPE_CHECKING:
    from lightllm_backend.runner.model_runner import ModelRunner, PendingStep
    from lightllm_backend.worker.load import LoadedEngine

# How long a worker whose supervisor is gone may take to end by itself.
ORPHAN_SECONDS = 5.0
# How often the loop looks whether the device is done already, while it waits for newcomers.
LOOK_SECONDS = 0.5e-3
# How long one turn of the loop may take before the worker counts as stuck; on a CPU a step may well take minutes.
GPU_PATIENCE_SECONDS, CPU_PATIENCE_SECONDS = 30.0, 600.0

log = logging.getLogger("lightllm.worker")


def run(
    server: EngineServer, router: Router, followers: BatchSender, runner: ModelRunner,
    log_stats_interval: float, vitals: Vitals, clock: Callable[[], float] = time.monotonic,
) -> None:  # fmt: skip
    """THE loop: receive, schedule, run, apply, emit; until the server's owner is gone.

    Up to `runner.overlap` steps are in flight while the next is planned, which waits for newcomers as long as the
    device does not wait for it. If a step fails, each request ends with an error and the failure is raised: the process
    is not to be trusted any more, its supervisor starts another.
    """
    in_flight: deque[tuple[Batch, PendingStep]] = deque()
    statistics, timer = StatisticsLog(log_stats_interval), LaunchTimer(clock)
    try:
        while server.open:
            idle = not router.has_work and not in_flight
            refused = receive(server, router, timeout=STATS_SECONDS if idle else 0.0)
            while (spare := timer.spare_seconds()) > 0 and not in_flight[0][1].is_done():
                refused += receive(server, router, timeout=min(spare, LOOK_SECONDS))
            timer.planning()
            batch = router.next_batch()
            vitals.turn(busy=batch is not None or bool(in_flight))
            if batch is not None:
                followers.send(batch)
                in_flight.append((batch, runner.launch(batch)))
                timer.launched(batch, all_admitted=not router.has_queue)
            while in_flight and (len(in_flight) > runner.overlap or batch is None):
                done, step = in_flight.popleft()
                result = step.result()
                vitals.took()
                timer.finished()
                server.send(router.apply(done, result))
            server.send(StepOutput.of_chunks(refused + router.drain_finished()))
            stats = engine_stats(router)
            server.tell(stats)
            statistics.tell(stats)
    except Exception as error:
        failure = RequestError("INTERNAL", f"the engine failed: {type(error).__name__}: {error}")
        router.fail_all(failure)
        server.send(StepOutput.of_chunks(router.drain_finished()))
        raise


def follow(batches: BatchReceiver, runner: ModelRunner) -> None:
    """The loop of the other ranks, until rank 0 is gone. It does not wait for the device: rank 0 does, before it plans
    further steps.
    """
    try:
        while True:
            runner.launch(batches.receive())
    except ChannelClosed:
        pass


def receive(server: EngineServer, router: Router, timeout: float) -> list[TokenChunk]:
    """Hand all messages that have come to the router; the chunks are those of requests that it refuses."""
    refused = []
    for kind, body in server.receive(timeout):
        if kind == SUBMIT:
            packed, handle = body
            request = unpack_request(packed)
            try:
                router.submit(request, handle)
            except RequestError as error:
                refused.append(TokenChunk(request.uid, [], [], FinishReason.FAILED, error=error))
        elif kind == CANCEL:
            router.cancel(body)
        elif kind == STOP:
            router.stop(body)
        elif kind == CLOSE:
            router.close(RequestError("UNAVAILABLE", body))
    return refused


def engine_stats(router: Router) -> EngineStats:
    stats = router.stats()
    return EngineStats(
        queued_requests=stats.queued,
        running_requests=stats.running,
        kv_tokens_used=stats.kv_tokens_used,
        kv_tokens_cached=stats.kv_tokens_cached,
        kv_tokens_total=stats.kv_tokens_total,
        prompt_tokens_total=stats.prompt_tokens_total,
        generated_tokens_total=stats.generated_tokens_total,
        pauses_total=stats.pauses_total,
        device_seconds_total=stats.device_seconds_total,
    )


class StatisticsLog:
    """A line of statistics every so many seconds, while there is something to tell: a token a second at least, so not
    the supervisor's probes."""

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._told, self._since = EngineStats(), time.monotonic()

    def tell(self, stats: EngineStats) -> None:
        now = time.monotonic()
        seconds = now - self._since
        if self._interval == 0 or seconds < self._interval:
            return
        prompt_tokens = (stats.prompt_tokens_total - self._told.prompt_tokens_total) / seconds
        generated_tokens = (stats.generated_tokens_total - self._told.generated_tokens_total) / seconds
        if max(prompt_tokens, generated_tokens, stats.running_requests, stats.queued_requests) >= 1:
            log.info(
                "%d running, %d queued, %d of %d KV tokens used (%.0f %%), %.0f prompt and %.0f generated tokens/s",
                stats.running_requests, stats.queued_requests, stats.kv_tokens_used, stats.kv_tokens_total,
                100 * stats.kv_tokens_used / stats.kv_tokens_total, prompt_tokens, generated_tokens,
            )  # fmt: skip
        self._told, self._since = stats, now


def build_router(
    config: EngineConfig, info: EngineInfo, batch_max_tokens: int, prefixes_are_alike: bool = True
) -> Router:
    return Router(
        capacity=info.pool_tokens,
        max_running=config.running_max_req_size,
        batch_max_tokens=batch_max_tokens,
        max_queue_size=config.max_queue_size,
        eos_ids=frozenset(info.eos_ids),
        queue_timeout_s=config.queue_timeout_s,
        policy=PastFutureAdmission() if config.admission == "past_future" else ExactAdmission(),
        prefix_cache=config.prefix_cache and prefixes_are_alike,
    )


class Leader:
    """Rank 0."""

    def __init__(self, config: EngineConfig, address: str, parent_pipe: int) -> None:
        self._config = config
        # Listening before it meets the others, it is there when they connect.
        self._followers = BatchSender(_batches_address(address), config.tp - 1)
        self._engine = _load(config, 0, address)
        self._vitals = _vitals(address, 0, self._engine.info)
        self._server = EngineServer(address, self._engine.info, parent_pipe)
        self._followers.accept()

    def run(self) -> None:
        engine = self._engine
        router = build_router(self._config, engine.info, engine.batch_max_tokens, engine.prefixes_are_alike)
        try:
            run(self._server, router, self._followers, engine.runner, self._config.log_stats_interval, self._vitals)
        finally:
            self._server.close()
            self._followers.close()
            self._vitals.close()


class Follower:
    """Any other rank."""

    def __init__(self, config: EngineConfig, address: str, rank: int) -> None:
        self._engine = _load(config, rank, address)
        self._vitals = _vitals(address, rank, self._engine.info)
        self._batches = BatchReceiver(_batches_address(address))

    def run(self) -> None:
        try:
            follow(self._batches, self._engine.runner)
        finally:
            self._vitals.close()


def _load(config: EngineConfig, rank: int, address: str) -> LoadedEngine:
    from lightllm_backend.worker.load import load_engine  # torch only now: a wrong setting is told at once

    return load_engine(config, rank, rendezvous_file(address))


def _vitals(address: str, rank: int, info: EngineInfo) -> Vitals:
    patience = CPU_PATIENCE_SECONDS if info.device == "cpu" else GPU_PATIENCE_SECONDS
    return Vitals(Path(address).parent, f"worker-{rank}", patience)


def _batches_address(address: str) -> str:
    return f"{address}.batches"


def watch_parent(parent_pipe: int) -> None:
    """End this process soon after its supervisor, also where a collective waits for a rank that is no more."""
    os.read(parent_pipe, 1)  # returns at end-of-file: nothing is ever written
    time.sleep(ORPHAN_SECONDS)
    os._exit(1)


def main() -> None:
    address, rank = sys.argv[1], int(sys.argv[2])
    status, parent_pipe = os.dup(sys.stdout.fileno()), os.dup(sys.stdin.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a library prints is log
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s %(levelname).1s %(name)s.{rank}: %(message)s")
    threading.excepthook = leave_with_thread
    threading.Thread(target=watch_parent, args=(parent_pipe,), name="parent-pipe", daemon=True).start()
    try:
        config = EngineConfig.build({}, os.environ)
        worker = Leader(config, address, parent_pipe) if rank == 0 else Follower(config, address, rank)
    except Exception as error:
        known = isinstance(error, (ConfigError, ModelError))
        log.error("cannot start: %s", error, exc_info=not known)
        message = str(error) if known else f"{type(error).__name__}: {error}"
        os.write(status, f"error: {' '.join(message.split())}\n".encode(errors="backslashreplace"))
        leave(1)
    gc.collect()
    gc.freeze()  # what is loaded stays; the collector need not walk it between steps
    os.write(status, b"ready\n")
    try:
        worker.run()
    except Exception:
        log.exception("the engine failed")
        leave(1)
    leave(0)


def leave_with_thread(failure: threading.ExceptHookArgs) -> None:
    """A worker without one of its threads is not to be trusted; the supervisor starts another."""
    log.error("thread %s failed", failure.thread and failure.thread.name, exc_info=failure.exc_value)
    leave(1)


def leave(code: int) -> NoReturn:
    """End without tearing down what torch has built: that waits for steps in flight, which may wait for other ranks."""
    logging.shutdown()
    os._exit(code)


if __name__ == "__main__":
    main()
