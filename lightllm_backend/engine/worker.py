# SPDX-License-Identifier: Apache-2.0
"""A worker: the process that holds a GPU (or the CPU cores), the Router and the step loop, which meet nowhere else.

Run by the EngineSupervisor as `python -m lightllm_backend.engine.worker SOCKET`. Its settings come from the
environment, its standard output tells the supervisor how it is (see supervisor.py), its log goes to standard error.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import time
from collections import deque
from typing import TYPE_CHECKING

from lightllm_backend.config import ConfigError, EngineConfig
from lightllm_backend.engine.channel import CANCEL, STOP, SUBMIT, EngineInfo, EngineStats, unpack_request
from lightllm_backend.engine.hub import STATS_SECONDS, Hub
from lightllm_backend.models.errors import ModelError
from lightllm_backend.request import FinishReason, RequestError, TokenChunk
from lightllm_backend.router.batch import Batch
from lightllm_backend.router.router import Router

if TYPE_CHECKING:
    from lightllm_backend.runner.model_runner import ModelRunner, PendingStep

log = logging.getLogger("lightllm.worker")


def run(hub: Hub, router: Router, runner: ModelRunner, log_stats_interval: float) -> None:
    """THE loop: receive, schedule, run, apply, emit; until the hub's owner is gone.

    Up to `runner.overlap` steps are in flight while the next is planned. If a step fails, each request ends with an
    error and the failure is raised: the process is not to be trusted any more, its supervisor starts another.
    """
    in_flight: deque[tuple[Batch, PendingStep]] = deque()
    statistics = StatisticsLog(log_stats_interval)
    try:
        while hub.open:
            idle = not router.has_work and not in_flight
            chunks = receive(hub, router, timeout=STATS_SECONDS if idle else 0.0)
            batch = router.next_batch()
            if batch is not None:
                in_flight.append((batch, runner.launch(batch)))
            while in_flight and (len(in_flight) > runner.overlap or batch is None):
                done, step = in_flight.popleft()
                chunks += router.apply(done, step.result())
            chunks += router.drain_finished()
            stats = engine_stats(router)
            hub.send(chunks, stats)
            statistics.tell(stats)
    except Exception as error:
        log.exception("a step failed")
        failure = RequestError("INTERNAL", f"the engine failed: {type(error).__name__}: {error}")
        router.fail_all(failure)
        hub.send(router.drain_finished(), engine_stats(router))
        raise


def receive(hub: Hub, router: Router, timeout: float) -> list[TokenChunk]:
    """Hand all messages that have come to the router; the chunks are those of requests that it refuses."""
    refused = []
    for kind, body in hub.receive(timeout):
        if kind == SUBMIT:
            request = unpack_request(body)
            try:
                router.submit(request)
            except RequestError as error:
                refused.append(TokenChunk(request.uid, [], [], FinishReason.FAILED, error=error))
        elif kind == CANCEL:
            router.cancel(body)
        elif kind == STOP:
            router.stop(body)
    return refused


def engine_stats(router: Router) -> EngineStats:
    stats = router.stats()
    return EngineStats(
        queued_requests=stats.queued,
        running_requests=stats.running,
        kv_tokens_used=stats.kv_tokens_used,
        kv_tokens_total=stats.kv_tokens_total,
        prompt_tokens_total=stats.prompt_tokens_total,
        generated_tokens_total=stats.generated_tokens_total,
    )


class StatisticsLog:
    """A line of statistics every so many seconds, while there is something to tell."""

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._told, self._since = EngineStats(), time.monotonic()

    def tell(self, stats: EngineStats) -> None:
        now = time.monotonic()
        seconds = now - self._since
        if self._interval == 0 or seconds < self._interval:
            return
        if stats != self._told:
            log.info(
                "%d running, %d queued, %d of %d KV tokens used (%.0f %%), %.0f prompt and %.0f generated tokens/s",
                stats.running_requests, stats.queued_requests, stats.kv_tokens_used, stats.kv_tokens_total,
                100 * stats.kv_tokens_used / stats.kv_tokens_total,
                (stats.prompt_tokens_total - self._told.prompt_tokens_total) / seconds,
                (stats.generated_tokens_total - self._told.generated_tokens_total) / seconds,
            )  # fmt: skip
        self._told, self._since = stats, now


def build_router(config: EngineConfig, info: EngineInfo, batch_max_tokens: int) -> Router:
    return Router(
        capacity=info.pool_tokens,
        max_running=config.running_max_req_size,
        batch_max_tokens=batch_max_tokens,
        max_queue_size=config.max_queue_size,
        eos_ids=frozenset(info.eos_ids),
        queue_timeout_s=config.queue_timeout_s,
    )


def main() -> None:
    address = sys.argv[1]
    status, leash = os.dup(sys.stdout.fileno()), os.dup(sys.stdin.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a library prints is log
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname).1s %(name)s: %(message)s")
    try:
        config = EngineConfig.build({}, os.environ)
        from lightllm_backend.engine.load import load_engine  # torch only now: a wrong setting is told at once

        engine = load_engine(config)
        hub = Hub(address, engine.info, leash)
    except Exception as error:
        known = isinstance(error, (ConfigError, ModelError))
        log.error("cannot start: %s", error, exc_info=not known)
        message = str(error) if known else f"{type(error).__name__}: {error}"
        os.write(status, f"error: {' '.join(message.split())}\n".encode())
        sys.exit(1)
    gc.collect()
    gc.freeze()  # what is loaded stays; the collector need not walk it between steps
    os.write(status, b"ready\n")
    try:
        run(hub, build_router(config, engine.info, engine.batch_max_tokens), engine.runner, config.log_stats_interval)
    finally:
        hub.close()


if __name__ == "__main__":
    main()
