# SPDX-License-Identifier: Apache-2.0
"""Streams whose clients read nothing: what they cost their neighbours, and each process of the server in memory.

    python -m perf.slow_readers --readers 30 --rounds 3

The engine tells the time in steps that are all alike (perf/sleeping_engine.py), so the figures are the server's. Each
round has three phases of equal length, whose order changes from round to round: some neighbours stream alone, beside
clients over gRPC and HTTP that read, and beside as many that are stopped by a signal once their streams have begun. A
round's pace is compared with the same round's pace alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.synchronize import Semaphore
from pathlib import Path
from statistics import median
from typing import Any

import click

from lightllm_client.errors import LightLLMError
from perf.model_directory import write_model_directory
from perf.overload import MODEL, gaps, megabytes, percentiles
from perf.record import RESULTS, circumstances, write_result
from perf.serving.calls import Target, caller_for
from perf.serving.measure import RequestFailed
from perf.serving.systems import ServerSystem, launched_server
from perf.serving.workload import Length, WorkItem
from perf.sleeping_engine import STEP_MS

SETTINGS = {"worker_python": "perf/sleeping_engine.py", "load_format": "dummy"}
PHASES = ("alone", "beside readers", "beside clients that read nothing")
PROMPT = "Once upon a time"
SETTLE_SECONDS = 1.0  # in which tokens that had waited behind what has just begun or ended are delivered
BEGIN_SECONDS = 120.0  # for streams to begin, and for what they leave to end


@dataclass
class Neighbours:
    """Streams whose pace is measured: when each response came, and its tokens."""

    times: list[list[float]]
    tokens: list[tuple[float, int]] = field(default_factory=list)

    async def stream(self, target: Target, number: int, output: int) -> None:
        """Stream one answer after the other until this task is cancelled."""
        async with caller_for(target) as caller:
            while True:
                async for part in caller.ask(caller.payload(WorkItem(PROMPT, Length(4, output)))):
                    now = time.monotonic()
                    self.times[number].append(now)
                    self.tokens.append((now, part.num_output_tokens))

    def pace(self, begin: float, end: float) -> float:
        """Tokens a second of each stream between two moments."""
        count = sum(tokens for moment, tokens in self.tokens if begin <= moment < end)
        return count / (end - begin) / len(self.times)


async def open_streams(targets: Sequence[Target], output: int, begun: Semaphore) -> None:
    """Stream from each target until the end of its answer; tell when each stream has begun."""

    async def read(target: Target) -> None:
        is_new = True
        async with caller_for(target) as caller:
            async for _ in caller.ask(caller.payload(WorkItem(PROMPT, Length(4, output)))):
                if is_new:
                    begun.release()
                is_new = False

    await asyncio.gather(*map(read, targets))


def be_clients(targets: Sequence[Target], output: int, begun: Semaphore) -> None:
    """The clients' process."""
    with contextlib.suppress(RequestFailed, LightLLMError):
        asyncio.run(open_streams(targets, output, begun))


@contextlib.contextmanager
def clients(targets: Sequence[Target], output: int, reading: bool) -> Iterator[None]:
    """A process with a stream from each target, which is stopped by a signal if it is not to read."""
    context = get_context("spawn")
    begun = context.Semaphore(0)
    process = context.Process(target=be_clients, args=(targets, output, begun))
    process.start()
    try:
        for _ in targets:
            if not begun.acquire(timeout=BEGIN_SECONDS):
                raise RequestFailed("the streams have not begun")
        if not reading:
            os.kill(process.pid or 0, signal.SIGSTOP)
        yield
    finally:
        process.kill()
        process.join()


async def measure(
    server: ServerSystem, readers: int, num_neighbours: int, rounds: int, seconds: float, step_ms: float
) -> list[dict[str, Any]]:
    """Each phase's pace, pauses and memory."""
    targets = [
        Target(protocol, f"127.0.0.1:{server.ports[f'{protocol}_port']}")
        for protocol in itertools.islice(itertools.cycle(["grpc", "http"]), max(readers, num_neighbours))
    ]
    output = round(3 * seconds * 1e3 / step_ms)  # more than a phase has time for
    neighbours = Neighbours([[] for _ in range(num_neighbours)])
    running = [
        asyncio.create_task(neighbours.stream(target, number, 2 * output))
        for number, target in enumerate(targets[:num_neighbours])
    ]
    phases = []
    for number in range(rounds):
        for phase in (*PHASES[number % 3 :], *PHASES[: number % 3]):
            await rest(server, num_neighbours)
            before = megabytes()
            with contextlib.ExitStack() as stack:
                if phase != PHASES[0]:
                    manager = clients(targets[:readers], output, reading=phase == PHASES[1])
                    await asyncio.to_thread(stack.enter_context, manager)
                await asyncio.sleep(SETTLE_SECONDS)
                begin = time.monotonic()
                await asyncio.sleep(seconds)
                end, after = time.monotonic(), megabytes()
            if failed := [task for task in running if task.done()]:
                failed[0].result()
            phases.append(
                {
                    "round": number, "phase": phase, "tokens_per_second": neighbours.pace(begin, end),
                    "gaps": percentiles(gaps(neighbours.times, begin, end)), "mb_before": before, "mb_after": after,
                }
            )  # fmt: skip
            click.echo(f"{phase}: {phases[-1]['tokens_per_second']:.2f} tokens/s each", err=True)
    await rest(server, num_neighbours)
    phases.append({"phase": "after", "mb_after": megabytes()})
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    return phases


async def rest(server: ServerSystem, num_neighbours: int) -> None:
    """Wait until the neighbours alone stream."""
    end = time.monotonic() + BEGIN_SECONDS
    while (await asyncio.to_thread(server.moment)).running_requests != num_neighbours:
        if time.monotonic() > end:
            raise RequestFailed("the engine still has the requests of clients that have gone")
        await asyncio.sleep(0.2)


def summary(phases: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The pace of each phase relative to its round's alone, and by how much each process has grown in a phase."""
    measured = [phase for phase in phases if "round" in phase]
    alone = {phase["round"]: phase["tokens_per_second"] for phase in measured if phase["phase"] == PHASES[0]}
    pace = {
        name: [phase["tokens_per_second"] / alone[phase["round"]] for phase in measured if phase["phase"] == name]
        for name in PHASES[1:]
    }
    growth: defaultdict[str, float] = defaultdict(float)
    for phase in measured:
        if phase["phase"] == PHASES[2]:
            for role, size in phase["mb_after"].items():
                growth[role] = max(growth[role], size - phase["mb_before"].get(role, size))
    return {
        "pace": {name: {"median": median(shares), "least": min(shares)} for name, shares in pace.items()},
        "growth_mb": dict(growth),
        "p99_gap_ms": {
            name: median(1e3 * phase["gaps"]["p99"] for phase in measured if phase["phase"] == name) for name in PHASES
        },
    }


@click.command()
@click.option("--readers", default=30, show_default=True, help="streams of clients that read nothing, or read")
@click.option("--neighbours", default=8, show_default=True, help="streams whose pace is measured")
@click.option("--rounds", default=3, show_default=True)
@click.option("--seconds", default=15.0, show_default=True, help="of each phase")
@click.option("--step_ms", default=20.0, show_default=True, help="how long each step of the engine takes")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "slow_readers.json", show_default=True)
def main(readers: int, neighbours: int, rounds: int, seconds: float, step_ms: float, out: Path) -> None:
    """Measure what clients that read nothing cost the others."""
    os.environ[STEP_MS] = str(step_ms)
    with tempfile.TemporaryDirectory() as scratch:
        write_model_directory(MODEL, Path(scratch))
        with launched_server({**SETTINGS, "model_dir": scratch}, Target("grpc", ""), 1) as server:
            phases = asyncio.run(measure(server, readers, neighbours, rounds, seconds, step_ms))
    figures = summary(phases)
    for name, value in figures.items():
        click.echo(f"{name}: {value}")
    asked = {"readers": readers, "neighbours": neighbours, "seconds": seconds, "step_ms": step_ms}
    write_result(out, {"benchmark": "slow_readers", **circumstances(None), **asked, **figures, "phases": phases})


if __name__ == "__main__":
    main()
