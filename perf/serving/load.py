# SPDX-License-Identifier: Apache-2.0
"""The load: client processes that send their share of the requests when they are due, and trace the answers.

A client process's life, over its pipe to the parent: it connects and asks for two tokens, says READY, is told when to
start, says how far it is (PROGRESS) while it works, and ends with its RESULT, or with FAILED at the first thing that is
not as it should be, whereupon the parent ends all of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np

from lightllm_client.errors import LightLLMError
from perf.serving.calls import Caller, Target, caller_for
from perf.serving.http_connection import CONNECT_SECONDS
from perf.serving.measure import FIRST_CALL, ClientShare, RequestFailed, Trace, check, name_of
from perf.serving.workload import Length, WorkItem

READY, PROGRESS, RESULT, FAILED = range(4)
START_SECONDS = 0.2  # from the moment when all clients are ready to the first request
TICK_SECONDS = 0.02
PROGRESS_TICKS = 10
GREETING = WorkItem((3, 4, 5), Length(3, 2))


@dataclass(frozen=True)
class Planned:
    index: int
    due: float  # seconds after the start
    item: WorkItem


def run_load(
    target: Target, plan: Sequence[Planned], processes: int, concurrency: int | None, on_progress: Callable[[int], None]
) -> tuple[float, list[Trace], list[ClientShare]]:
    """When it started, and what all clients saw. `on_progress` is told how many requests have ended since it was last.

    concurrency: the most requests at once, over all processes.
    """
    count = min(processes, len(plan), concurrency or processes)
    context = multiprocessing.get_context("spawn")
    pipes: dict[Connection, BaseProcess] = {}
    try:
        for number in range(count):
            limit = None if concurrency is None else concurrency // count + (number < concurrency % count)
            ours, theirs = context.Pipe()
            process: BaseProcess = context.Process(
                target=client_process, args=(theirs, target, plan[number::count], limit), daemon=True
            )
            process.start()
            theirs.close()
            pipes[ours] = process
        for pipe, process in pipes.items():
            _receive(pipe, process)
        started = time.monotonic() + START_SECONDS
        for pipe in pipes:
            pipe.send(started)
        results = _collect(pipes, on_progress)
    finally:
        for process in pipes.values():
            process.terminate()
            process.join()
    traces = sorted((trace for seen, _ in results for trace in seen), key=lambda trace: trace.index)
    return started, traces, [share for _, share in results]


def _collect(
    pipes: dict[Connection, BaseProcess], on_progress: Callable[[int], None]
) -> list[tuple[list[Trace], ClientShare]]:
    results = []
    waiting = list(pipes)
    while waiting:
        for ready in wait(waiting):
            assert isinstance(ready, Connection)
            kind, content = _receive(ready, pipes[ready])
            if kind == PROGRESS:
                on_progress(content)
            else:
                results.append(content)
                waiting.remove(ready)
    return results


def _receive(pipe: Connection, process: BaseProcess) -> tuple[int, Any]:
    try:
        kind, content = pipe.recv()
    except EOFError:
        process.join()
        raise RequestFailed(f"a client process ended with exit code {process.exitcode}") from None
    if kind == FAILED:
        raise RequestFailed(content)
    return kind, content


def client_process(pipe: Connection, target: Target, plan: Sequence[Planned], concurrency: int | None) -> None:
    try:
        asyncio.run(_Client(pipe, target, plan, concurrency).run())
    except RequestFailed as failure:
        pipe.send((FAILED, str(failure)))
    except KeyboardInterrupt:
        pass  # the parent has it as well, and tells


class _Client:
    def __init__(self, pipe: Connection, target: Target, plan: Sequence[Planned], concurrency: int | None) -> None:
        self._pipe = pipe
        self._target = target
        self._plan = plan
        self._slots = None if concurrency is None else asyncio.Semaphore(concurrency)
        self._traces: list[Trace] = []
        self._told = 0  # how many of them the parent knows of
        self._send_lags: list[float] = []
        self._loop_lags: list[float] = []

    async def run(self) -> None:
        async with caller_for(self._target) as caller:
            payloads = [caller.payload(planned.item) for planned in self._plan]
            await self._greet(caller)
            self._pipe.send((READY, None))
            started = await asyncio.get_running_loop().run_in_executor(None, self._pipe.recv)
            watch = asyncio.create_task(self._watch_loop())
            computing, began = time.process_time(), time.monotonic()
            await self._send_all(caller, payloads, started)
            cpu_share = (time.process_time() - computing) / (time.monotonic() - began)
            watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watch
        self._tell_progress()
        loop_lag = float(np.percentile(self._loop_lags, 99)) if self._loop_lags else 0.0
        on_time = self._slots is None and self._plan[-1].due > 0
        send_lag = float(np.percentile(self._send_lags, 99)) if on_time else 0.0
        self._pipe.send((RESULT, (self._traces, ClientShare(cpu_share, loop_lag, send_lag))))

    async def _greet(self, caller: Caller) -> None:
        """Opens the connection and finds out that there is a server."""
        call = self._trace(caller, FIRST_CALL, GREETING, caller.payload(GREETING))
        try:
            await asyncio.wait_for(call, CONNECT_SECONDS)
        except asyncio.TimeoutError:
            raise RequestFailed(f"{self._target.address} does not answer within {CONNECT_SECONDS:g} s") from None

    async def _send_all(self, caller: Caller, payloads: list[Any], started: float) -> None:
        answers = []
        for planned, payload in zip(self._plan, payloads, strict=True):
            if (seconds := started + planned.due - time.monotonic()) > 0:
                await asyncio.sleep(seconds)
            answers.append(asyncio.create_task(self._answer(caller, planned, payload, started)))
        await asyncio.gather(*answers)

    async def _answer(self, caller: Caller, planned: Planned, payload: Any, started: float) -> None:
        async with self._slots or contextlib.nullcontext():
            self._send_lags.append(time.monotonic() - started - planned.due)
            try:
                trace = await self._trace(caller, planned.index, planned.item, payload)
            except RequestFailed as failure:
                self._pipe.send((FAILED, str(failure)))  # now: others may be waiting for long
            else:
                self._traces.append(trace)

    async def _trace(self, caller: Caller, index: int, item: WorkItem, payload: Any) -> Trace:
        trace = Trace(index, sent=time.monotonic())
        try:
            async for part in caller.ask(payload):
                trace.arrivals.append(time.monotonic())
                trace.tokens.append(part.num_output_tokens)
                trace.prompt_tokens, trace.finish_reason = part.num_input_tokens, part.finish_reason
        except (RequestFailed, LightLLMError) as error:
            raise RequestFailed(f"{name_of(index, item)}, after {trace.output_tokens} tokens: {error}") from None
        check(trace, item, self._target.streaming, self._target.ignore_eos)
        return trace

    async def _watch_loop(self) -> None:
        """How late this process comes to what it has to do; now and then, how far it is."""
        for tick in itertools.count(1):
            expected = time.monotonic() + TICK_SECONDS
            await asyncio.sleep(TICK_SECONDS)
            self._loop_lags.append(time.monotonic() - expected)
            if tick % PROGRESS_TICKS == 0:
                self._tell_progress()

    def _tell_progress(self) -> None:
        self._pipe.send((PROGRESS, len(self._traces) - self._told))
        self._told = len(self._traces)
