# SPDX-License-Identifier: Apache-2.0
"""The host's own time a step, on the CPU alone: the Router's, and that of packing tokens for clients.

    python -m perf.router_time

The Router has a KV pool that about so many sequences of ShareGPT's lengths fill, so it looks at each step whether the
first in the queue fits; each that ends is replaced by a new one. Its time is that of submitting, planning and applying.
The EngineServer sends each step's output to one client in another process, which reads and forgets it.
"""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from lightllm_backend.lengths import LengthLimits
from lightllm_backend.messages.channel import Channel, ChannelClosed
from lightllm_backend.messages.engine_messages import EngineInfo, Submit
from lightllm_backend.request import Request, SamplingParams
from lightllm_backend.router.admission import AdmissionPolicy, ExactAdmission
from lightllm_backend.router.batch import StepResult
from lightllm_backend.router.past_future import PastFutureAdmission
from lightllm_backend.router.router import Router
from lightllm_backend.worker.server import EngineServer
from perf.lengths import DATA, Lengths, conversation_lengths
from perf.record import RESULTS, circumstances, write_result

CASES = [
    *((running, queued, "exact") for running, queued in [(100, 100), (100, 10_000), (100, 100_000), (1000, 0)]),
    *((1000, queued, "exact") for queued in (100, 1000, 10_000, 100_000)),
    (1000, 10_000, "past_future"),
]
POLICIES: dict[str, Callable[[], AdmissionPolicy]] = {"exact": ExactAdmission, "past_future": PastFutureAdmission}
BATCH_MAX_TOKENS = 8192
MAX_LENGTH = 2048
EOS_ID = 2


def sharegpt_lengths() -> list[Lengths]:
    return [lengths for lengths in conversation_lengths(DATA / "sharegpt_lengths.csv") if sum(lengths) <= MAX_LENGTH]


def conversations(tenants: int = 1) -> Iterator[Request]:
    """Requests of ShareGPT's lengths in random order, without end; of so many tenants in turn."""
    lengths = sharegpt_lengths()
    chosen = np.random.default_rng(0).integers(len(lengths), size=1 << 20)
    for number in itertools.count():
        prompt, output = lengths[chosen[number % len(chosen)]]
        # Prompts differ from the first token on: nothing is shared.
        sampling = SamplingParams(max_tokens=output)
        yield Request(str(number), (number, *range(1, prompt)), sampling, tenant=str(number % tenants))


def tokens_held() -> float:
    """By a running sequence, on average over time: half of its output and its prompt, weighted by how long it runs."""
    prompts, outputs = np.array(sharegpt_lengths()).T
    return float(np.average(prompts + outputs / 2, weights=outputs))


class Load:
    """A Router, an EngineServer and its client under a steady load."""

    def __init__(
        self, server: EngineServer, running: int, queued: int, admission: str = "exact", tenants: int = 1
    ) -> None:
        held = int(running * tokens_held())
        rows = 2 * running if queued else running
        capacity, policy = held if queued else 2 * held, POLICIES[admission]()
        self._router = Router(capacity, rows, BATCH_MAX_TOKENS, 1 << 20, frozenset({EOS_ID}), policy=policy)
        self._server = server
        self._requests = conversations(tenants)
        self._handles = itertools.count()
        self._to_submit = running + queued
        self._batch: Any = None

    @property
    def running(self) -> int:
        return self._router.stats().running_requests

    def step(self) -> tuple[float, float]:
        """Seconds of the Router and the EngineServer in one step, planned before the last step's tokens are applied."""
        new = [next(self._requests) for _ in range(self._to_submit)]
        result = self._batch and StepResult(np.full(int(self._batch.samples.sum()), 7, dtype=np.int32))
        started = time.perf_counter()
        for request in new:
            self._router.submit(request, next(self._handles))
        batch = self._router.next_batch()
        output = self._router.apply(self._batch, result) if self._batch else None
        applied = time.perf_counter()
        if output:
            self._server.send(output)
        sent = time.perf_counter()
        self._batch = batch
        self._to_submit = sum(chunk.finish_reason is not None for chunk in output.chunks) if output else 0
        return applied - started, sent - applied


def measure(
    server: EngineServer, running: int, queued: int, admission: str, steps: int, warm_up: int, tenants: int
) -> dict[str, Any]:
    load = Load(server, running, queued, admission, tenants)
    for _ in range(warm_up):
        load.step()
    gc.collect()
    gc.freeze()  # as the worker does
    counts, times = [], []
    for _ in range(steps):
        times.append(load.step())
        counts.append(load.running)
    router, sending = 1e3 * np.array(times).T
    row: dict[str, Any] = {"admission": admission, "running": float(np.mean(counts)), "queued": queued}
    for name, milliseconds in (("router", router), ("server", sending)):
        row |= {
            f"{name}_ms_p50": float(np.median(milliseconds)),
            f"{name}_ms_p99": float(np.quantile(milliseconds, 0.99)),
        }
    return row


def drain(address: str) -> None:
    """The client: reads until the server is gone."""
    channel = Channel.connect(address)
    channel.send(Submit(Request("first", (1,), SamplingParams()), 0))
    try:
        while True:
            channel.receive()
    except ChannelClosed:
        pass


@click.command(help=str(__doc__).partition("\n")[0])
@click.option("--steps", default=1000, show_default=True, type=click.IntRange(min=1), help="that count")
@click.option("--warm_up", default=1000, show_default=True, type=click.IntRange(min=0), help="steps before")
@click.option("--tenants", default=1, show_default=True, type=click.IntRange(min=1), help="that share the engine")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "router_time.json", help="the JSON file")
def main(steps: int, warm_up: int, tenants: int, out: Path) -> None:
    info = EngineInfo("", "", "", 32000, (EOS_ID,), LengthLimits(4095, "", 4096, ""), 1, {})
    with tempfile.TemporaryDirectory() as directory:
        address = str(Path(directory, "server"))
        server = EngineServer(address, info, os.pipe()[0])
        client = multiprocessing.get_context("spawn").Process(target=drain, args=(address,), daemon=True)
        client.start()
        while not any(server.receive(timeout=1.0)):
            pass
        rows = [measure(server, *case, steps, warm_up, tenants) for case in tqdm(CASES, unit="case")]
        server.close()
        client.join()
    table = Table(title="Host time a step, ms")
    for heading in rows[0]:
        table.add_column(heading.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=120).print(table)
    write_result(
        out, {"benchmark": "router_time", "steps": steps, "tenants": tenants, **circumstances(None), "rows": rows}
    )


if __name__ == "__main__":
    main()
