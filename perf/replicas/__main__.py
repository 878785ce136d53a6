# SPDX-License-Identifier: Apache-2.0
"""Replicas behind HAProxy (docs/replicas.md): is a request lost when they fail, and do more of them serve more?

    python -m perf.replicas chaos
    python -m perf.replicas chaos --engine sleeping --replicas 2
    python -m perf.replicas throughput
    python -m perf.replicas page

The first two start replicas of the launch command on this machine, and the proxy with deploy/proxy/haproxy.cfg.
chaos: clients ask without a pause while replicas are added, killed, stopped and rolled; exit code 1 if a request was
lost. throughput: tokens a second of 1, 2 and 4 replicas whose engine only tells the time. page: write the stored
results into docs/replicas.md.
"""

from __future__ import annotations

import asyncio
import os
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import psutil
from rich.console import Console
from rich.table import Table

from lightllm_backend.file_limit import raise_file_limit
from lightllm_client import LightLLMClient
from perf.record import RESULTS, circumstances, write_result
from perf.replicas.chaos import Chaos, Phase
from perf.replicas.clients import PROMPTS, Clients
from perf.replicas.fleet import MOST_REPLICAS, Fleet, haproxy, haproxy_version, running_fleet, sleeping_settings
from perf.replicas.page import PAGE, updated
from perf.serving.calls import Target
from perf.serving.load import Planned, run_load
from perf.serving.workload import Length, WorkItem

VOCABULARY = 30000  # of the made-up prompts


@click.group(help=str(__doc__).partition("\n\n")[0])
@click.pass_context
def main(context: click.Context) -> None:
    raise_file_limit()
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(1))  # the replicas are stopped nevertheless
    if context.invoked_subcommand != "page" and haproxy() is None:
        raise click.ClickException(
            "there is no haproxy; on Debian and Ubuntu: apt-get install haproxy (or set HAPROXY)"
        )


def record(name: str, **result: Any) -> dict[str, Any]:
    where = circumstances(None)
    where["versions"]["haproxy"] = haproxy_version()
    return {"benchmark": name, **where, **result}


@main.command()
@click.option("--engine", type=click.Choice(["embedded", "sleeping"]), default="embedded", show_default=True)
@click.option("--replicas", type=click.IntRange(2, MOST_REPLICAS), default=4, show_default=True)
@click.option("--concurrency", type=int, default=16, show_default=True, help="requests at once")
@click.option("--max_tokens", type=int, default=32, show_default=True, help="tokens of an answer")
@click.option("--rest", "seconds", type=float, default=10.0, show_default=True, help="seconds between two faults")
@click.option("--slowdown", type=float, default=1.0, show_default=True, help="of the sleeping engine's steps")
@click.option("--out", type=click.Path(path_type=Path), help="the result's file")
def chaos(
    engine: str, replicas: int, concurrency: int, max_tokens: int, seconds: float, slowdown: float, out: Path | None
) -> None:
    """Add, kill, stop and roll replicas while clients ask."""
    with tempfile.TemporaryDirectory(prefix="lightllm-replicas-") as name:
        folder = Path(name)
        settings: dict[str, object] = {"device": "cpu", "dtype": "float32"}
        if engine == "sleeping":
            settings = sleeping_settings(folder, slowdown)
        with running_fleet(settings, folder) as fleet:
            phases, codes = asyncio.run(_chaos(fleet, engine, replicas, concurrency, max_tokens, seconds))
    show(phases)
    options = {
        "engine": engine,
        "replicas": replicas,
        "concurrency": concurrency,
        "max_tokens": max_tokens,
        "slowdown": slowdown,
    }
    result = record("replicas_chaos", **options, phases=[phase.as_json() for phase in phases], exit_codes=codes)
    write_result(out or RESULTS / f"replicas_chaos_{engine}_{replicas}.json", result)
    if any(phase.tally.lost for phase in phases) or any(codes):
        sys.exit(1)


async def _chaos(
    fleet: Fleet, engine: str, count: int, concurrency: int, max_tokens: int, seconds: float
) -> tuple[list[Phase], list[int]]:
    first, *others = fleet.replicas[:count]
    await asyncio.to_thread(fleet.start, [first])
    expected = None if engine == "sleeping" else await asyncio.to_thread(answers, fleet, max_tokens)
    clients = Clients(fleet.proxy.grpc_url, fleet.proxy.openai_port, concurrency, max_tokens, expected)
    one = Chaos(fleet, clients)
    await clients.start()
    try:
        await one.rest("one replica", seconds)
        more = "another one is started" if len(others) == 1 else f"{len(others)} more are started"
        await one.start(more, others)
        await one.rest(f"{count} replicas", seconds)
        await one.kill(others[0])
        await one.rest("without the killed one", seconds)
        await one.start("the killed one is started again", [others[0]])
        codes = [await one.terminate(others[-1])]
        await one.rest("without the stopped one", seconds)
        await one.start("the stopped one is started again", [others[-1]])
        codes += [await one.replace(replica) for replica in fleet.replicas[:count]]
    finally:
        await clients.stop()
    return one.phases, codes


def answers(fleet: Fleet, max_tokens: int) -> dict[str, str]:
    """The model's greedy answer to each prompt."""
    with LightLLMClient(fleet.proxy.grpc_url) as client:
        options: Any = {"max_tokens": max_tokens, "ignore_eos": True, "temperature": 0.0}
        return {prompt: client.generate(prompt, **options).text for prompt in PROMPTS}


def show(phases: list[Phase]) -> None:
    table = Table(
        "meanwhile", "seconds", "answered", "repeated by the proxy", "by the library", "by the caller", "lost"
    )
    for phase in phases:
        tally = phase.tally
        repeated = phase.repeated, tally.retries, sum(tally.told.values())
        cells = [f"{phase.seconds:.1f}", tally.done, *repeated, len(tally.lost)]
        table.add_row(phase.name, *map(str, cells))
    console = Console(width=140)
    console.print(table)
    for phase in phases:
        for line in [*phase.tally.lost[:10], *(f"{count} x {words}" for words, count in phase.tally.told.items())]:
            console.print(f"{phase.name}: {line}", markup=False)


@main.command()
@click.option("--counts", default="1,2,4", show_default=True, help="numbers of replicas, comma-separated")
@click.option("--concurrency", type=int, default=64, show_default=True, help="requests at once a replica")
@click.option("--requests", type=int, default=512, show_default=True, help="requests a replica in each run")
@click.option("--max_tokens", type=int, default=256, show_default=True, help="tokens of an answer")
@click.option("--rounds", type=int, default=3, show_default=True, help="runs with each number of replicas")
@click.option("--processes", type=int, default=4, show_default=True, help="processes of clients")
@click.option("--slowdown", type=float, default=1.0, show_default=True, help="of the sleeping engine's steps")
@click.option("--out", type=click.Path(path_type=Path), help="the result's file")
def throughput(
    counts: str, concurrency: int, requests: int, max_tokens: int, rounds: int, processes: int, slowdown: float,
    out: Path | None,
) -> None:  # fmt: skip
    """Measure tokens a second by number of replicas, whose engine sleeps as long as LLaMA-7B's steps on an H200."""
    numbers = [int(part) for part in counts.split(",")]
    runs: dict[int, list[dict[str, float]]] = {number: [] for number in numbers}
    with tempfile.TemporaryDirectory(prefix="lightllm-replicas-") as name:
        folder = Path(name)
        with running_fleet(sleeping_settings(folder, slowdown), folder, front=False) as fleet:
            fleet.start(fleet.replicas[: max(numbers)])
            for number in numbers * rounds:
                for place, replica in enumerate(fleet.replicas[: max(numbers)]):
                    (fleet.proxy.undrain if place < number else fleet.proxy.drain)(replica.name)
                run = _run(fleet, number * requests, number * concurrency, max_tokens, processes)
                runs[number].append(run)
                click.echo(f"{number} replicas: " + ", ".join(f"{name} {value:.4g}" for name, value in run.items()))
    medians = {number: statistics.median(run["tokens_per_second"] for run in runs[number]) for number in numbers}
    base = medians[numbers[0]] / numbers[0]
    rows = [
        {"replicas": number, "tokens_per_second": medians[number], "linear": medians[number] / (number * base),
         "runs": runs[number]}
        for number in numbers
    ]  # fmt: skip
    for row in rows:
        click.echo(
            f"{row['replicas']} replicas: {row['tokens_per_second']:,.0f} tokens/s, {row['linear']:.3f} of linear"
        )
    options = {"concurrency": concurrency, "requests": requests, "max_tokens": max_tokens, "slowdown": slowdown}
    result = record("replicas_throughput", **options, processes=processes, rows=rows)
    write_result(out or RESULTS / f"replicas_throughput_{result['machine']['cores']}_cores.json", result)


def _run(fleet: Fleet, requests: int, concurrency: int, max_tokens: int, processes: int) -> dict[str, float]:
    """Tokens a second, which share of the cores was busy, and which share of a core the busiest client was."""
    target = Target("grpc", fleet.proxy.grpc_url)
    plan = [
        Planned(index, 0.0, WorkItem((3 + index % VOCABULARY, 4, 5, 6), Length(4, max_tokens)))
        for index in range(requests)
    ]
    idle, began = _idle_seconds(), time.monotonic()
    started, traces, shares = run_load(target, plan, processes, concurrency, lambda _: None)
    cores = len(os.sched_getaffinity(0))
    return {
        "tokens_per_second": requests * max_tokens / (max(trace.arrivals[-1] for trace in traces) - started),
        "cores_busy": 1 - (_idle_seconds() - idle) / (time.monotonic() - began) / cores,
        "client_busy": max(share.cpu_share for share in shares),
    }


def _idle_seconds() -> float:
    """For how long the cores of this process have been idle, in all, since the machine started."""
    times = psutil.cpu_times(percpu=True)
    return sum(times[core].idle + times[core].iowait for core in os.sched_getaffinity(0))


@main.command("page")
def write_page() -> None:
    """Write the stored results into docs/replicas.md."""
    PAGE.write_text(updated(PAGE.read_text()))


if __name__ == "__main__":
    main()
