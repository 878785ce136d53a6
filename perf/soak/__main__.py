# SPDX-License-Identifier: Apache-2.0
"""Mixed load for minutes with faults injected: does each request end exactly once, and does the service come back?

    python -m perf.soak --minutes 10
    python -m perf.soak --minutes 9 --model llama-7b --clients 400 --set mem_fraction=0.8

Starts the launch command. Clients stream and do not, over gRPC and HTTP, leave a quarter of their answers early, and
ask a few for what is not allowed. Meanwhile processes of the server are killed or stopped in turns, a fault every
`--fault_every` seconds. Exit code 1: a request had no end, a wrong one or a wrong number of tokens, the service did not
come back, or something was left behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import psutil
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from perf.model_directory import write_model_directory
from perf.record import RESULTS, ROOT, circumstances, write_result
from perf.serving.systems import free_ports
from perf.shapes import LENGTHS, SHAPES
from perf.soak.clients import Clients, End

START_SECONDS = 300.0
STOP_SECONDS = 90.0
SAMPLE_SECONDS = 5.0
# A fault has been survived once the service answers again; a new server has to load its model first.
BACK_SECONDS = 120.0
PROBE_SECONDS = 0.5
SHARED_MEMORY = Path("/dev/shm")

# Which processes a fault may hit, by what is in their command lines.
ROLES = {
    "worker": "lightllm_backend.worker.main",
    "guard": "lightllm_backend.launch.guard",
    "tokenizer": "/tokenizer/",
    "generation": "/generation/",
    "detokenizer": "/detokenizer/",
    "lightllm_unary": "/lightllm_unary/",
    "tritonserver": "/tritonserver ",
}
FAULTS = [(role, number) for number in (signal.SIGKILL, signal.SIGSTOP) for role in ROLES]


@dataclass
class Fault:
    """One fault and what came of it; times in seconds since the soak began."""

    role: str
    signal: str
    at: float
    back_after: float | None = None  # until a request is served again; None: it never was


@dataclass
class Sample:
    """The server's processes at one moment."""

    at: float
    megabytes: dict[str, float]  # resident, by role
    open_files: int
    processes: int


@dataclass
class Record:
    """Everything seen."""

    ends: Counter[str] = field(default_factory=Counter)
    tokens: Counter[int] = field(default_factory=Counter)  # by window of SAMPLE_SECONDS
    samples: list[Sample] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)  # descriptions of the ends that must not be
    errors: Counter[str] = field(default_factory=Counter)  # the words of all errors, without numbers


class ServerUnderTest:
    """The launch command, and whatever has descended from it."""

    def __init__(self, settings: dict[str, str], log: Path) -> None:
        self.http_port, self.grpc_port, metrics_port = free_ports(3)
        ports = {"http_port": self.http_port, "grpc_port": self.grpc_port, "metrics_port": metrics_port}
        options = [f"--{name}={value}" for name, value in {"restart": "1000", **settings, **ports}.items()]
        self._regions = set(SHARED_MEMORY.iterdir())
        self._log = log
        self.seen: dict[int, float] = {}  # every process that has been seen: its start time by pid
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "lightllm_backend.serve", *options],
                stdout=output, stderr=subprocess.STDOUT, cwd=ROOT,
            )  # fmt: skip

    def processes(self) -> dict[str, list[psutil.Process]]:
        """The live processes by role."""
        found: dict[str, list[psutil.Process]] = {}
        with contextlib.suppress(psutil.Error):
            for process in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    self.seen.setdefault(process.pid, process.create_time())
                    command = " ".join(process.cmdline()) + " "
                    role = next((role for role, part in ROLES.items() if part in command), "others")
                    found.setdefault(role, []).append(process)
        return found

    def stop(self) -> tuple[int | None, float]:
        """SIGTERM; returns the exit code (None: it had to be killed) and how long it took."""
        began = time.monotonic()
        self.process.terminate()
        try:
            code: int | None = self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            code = None
            self.process.kill()
            self.process.wait()
        return code, time.monotonic() - began

    def left_behind(self) -> list[str]:
        """Processes and shared memory that are still there."""
        left = []
        for pid, created in self.seen.items():
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                if process.create_time() == created and process.status() != psutil.STATUS_ZOMBIE:
                    left.append(f"process {pid}: {' '.join(process.cmdline())[:100]}")
        return left + [str(path) for path in sorted(set(SHARED_MEMORY.iterdir()) - self._regions)]

    def last_lines(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-30:])


async def wait_served(clients: Clients, limit: float) -> bool:
    """Ask for one token again and again until it comes."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        if await clients.probe():
            return True
        await asyncio.sleep(PROBE_SECONDS)
    return False


async def inject(
    server: ServerUnderTest, clients: Clients, record: Record, began: float, every: float, end: float
) -> None:
    """Inject a fault every so often, and measure when the service is back."""
    for role, number in itertools.cycle(FAULTS):
        if time.monotonic() + every > end:
            return
        await asyncio.sleep(every)
        victims = server.processes().get(role, [])
        if not victims:
            continue
        now = time.monotonic()
        fault = Fault(role, signal.Signals(number).name, now - began)
        record.faults.append(fault)
        with contextlib.suppress(psutil.Error):
            random.choice(victims).send_signal(number)
        await asyncio.sleep(PROBE_SECONDS)
        served = await _three_in_a_row(clients, now + BACK_SECONDS)
        fault.back_after = served - now if served else None


async def _three_in_a_row(clients: Clients, limit: float) -> float | None:
    """When the service was back: the first of three answers in a row, since one of two detokenizers may be gone."""
    first, count = 0.0, 0
    while time.monotonic() < limit:
        if await clients.probe():
            first = first or time.monotonic()
            count += 1
            if count == 3:
                return first
        else:
            first, count = 0.0, 0
            await asyncio.sleep(PROBE_SECONDS)
    return None


async def sample(server: ServerUnderTest, record: Record, began: float) -> None:
    """Look at the processes every SAMPLE_SECONDS."""
    while True:
        megabytes: dict[str, float] = {}
        files = count = 0
        for role, processes in server.processes().items():
            for process in processes:
                with contextlib.suppress(psutil.Error):
                    megabytes[role] = megabytes.get(role, 0.0) + process.memory_info().rss / 1e6
                    files += process.num_fds()
                    count += 1
        record.samples.append(Sample(time.monotonic() - began, megabytes, files, count))
        await asyncio.sleep(SAMPLE_SECONDS)


async def soak(
    server: ServerUnderTest, seconds: float, num_clients: int, every: float | None, longest: int, record: Record
) -> None:
    """Run the load, the faults and the samples for so long, then wait for what is in flight."""
    began = time.monotonic()

    def on_end(end: End) -> None:
        record.ends[end.kind] += 1
        record.tokens[int((time.monotonic() - began) / SAMPLE_SECONDS)] += end.num_tokens
        if end.detail:
            record.errors[f"{end.kind}: {re.sub(r'[0-9]+', 'N', end.detail)[:150]}"] += 1
        if end.is_wrong:
            record.wrong.append(f"{time.monotonic() - began:.1f} s: {end.request}: {end.kind}: {end.detail}")

    clients = Clients(server.http_port, server.grpc_port, longest, on_end)
    if not await wait_served(clients, START_SECONDS):
        raise click.ClickException(f"the server is not ready:\n{server.last_lines()}")
    began = time.monotonic()
    beside = [asyncio.create_task(sample(server, record, began))]
    if every:
        beside.append(asyncio.create_task(inject(server, clients, record, began, every, began + seconds)))
    load = [asyncio.create_task(clients.ask_until(began + seconds)) for _ in range(num_clients)]
    with tqdm(total=int(seconds), unit="s", desc="soak") as bar:
        while (passed := time.monotonic() - began) < seconds:
            bar.update(int(passed) - bar.n)
            await asyncio.sleep(1)
    await asyncio.gather(*load)
    beside[0].cancel()
    await asyncio.gather(*beside, return_exceptions=True)
    if not await wait_served(clients, BACK_SECONDS):
        record.wrong.append("the service did not come back after the load")
    await clients.aclose()


def growth(samples: list[Sample]) -> dict[str, float]:
    """How many megabytes each role has grown between the second and the last fifth, by medians."""
    fifth = max(1, len(samples) // 5)
    early, late = samples[fifth : 2 * fifth], samples[-fifth:]

    def median(part: list[Sample], role: str) -> float:
        values = sorted(one.megabytes[role] for one in part if role in one.megabytes)
        return values[len(values) // 2] if values else 0.0

    roles = sorted({role for one in samples for role in one.megabytes})
    return {role: round(median(late, role) - median(early, role), 1) for role in roles}


def show(console: Console, result: dict[str, Any]) -> None:
    ends = Table("end of a request", "number", title=f"{result['seconds']:.0f} s, {result['clients']} clients")
    for kind, count in sorted(result["ends"].items(), key=lambda item: -item[1]):
        ends.add_row(kind, f"{count:,}")
    faults = Table("fault", "at, s", "served again after, s")
    for fault in result["faults"]:
        back = fault["back_after"]
        faults.add_row(
            f"{fault['signal']} {fault['role']}", f"{fault['at']:.0f}", "never" if back is None else f"{back:.1f}"
        )
    memory = Table("process", "growth, MB")
    for role, megabytes in result["growth_mb"].items():
        memory.add_row(role, f"{megabytes:+.1f}")
    for table in (ends, faults, memory):
        console.print(table)
    console.print(
        f"exit code {result['exit_code']} after {result['stop_seconds']:.1f} s; left: {result['left'] or 'nothing'}"
    )
    for line in result["wrong"][:20]:
        console.print(f"wrong: {line}", markup=False)


@contextlib.contextmanager
def model_settings(model: str | None) -> Iterator[dict[str, str]]:
    """The settings of a model by shape; of the embedded one without a name."""
    if model is None:
        yield {}
        return
    with tempfile.TemporaryDirectory(prefix="lightllm-soak-") as directory:
        write_model_directory(model, Path(directory))
        yield {"model_dir": directory, "load_format": "dummy", **{name: str(value) for name, value in LENGTHS.items()}}


@click.command(help=str(__doc__).partition("\n\n")[0])
@click.option("--minutes", type=float, default=10.0, show_default=True)
@click.option("--clients", "num_clients", type=int, default=32, show_default=True, help="requests at once")
@click.option("--fault_every", type=float, default=45.0, show_default=True, help="seconds between faults; 0: no faults")
@click.option("--longest", type=int, default=64, show_default=True, help="the most tokens of an answer")
@click.option(
    "--model", type=click.Choice(sorted(SHAPES)), help="random weights in this shape (default: the embedded model)"
)
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="a setting of the engine")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="the result's file")
def main(
    minutes: float, num_clients: int, fault_every: float, longest: int, model: str | None, settings: tuple[str, ...],
    seed: int, out: Path | None,
) -> None:  # fmt: skip
    random.seed(seed)
    record = Record()
    given = dict(setting.split("=", 1) for setting in settings)
    with tempfile.TemporaryDirectory(prefix="lightllm-soak-log-") as logs, model_settings(model) as of_model:
        server = ServerUnderTest({**of_model, **given}, Path(logs) / "serve.log")
        try:
            asyncio.run(soak(server, minutes * 60, num_clients, fault_every or None, longest, record))
        finally:
            server.processes()
            exit_code, stop_seconds = server.stop()
        time.sleep(1)  # the kernel takes a moment to end what was killed
        left = server.left_behind()
        log_tail = server.last_lines()
    gpu = _gpu_name()
    result = {
        "benchmark": "soak", "model": model or "embedded", "settings": given, "clients": num_clients,
        "longest": longest, "fault_every": fault_every, "seed": seed, "seconds": minutes * 60, **circumstances(gpu),
        "ends": dict(record.ends), "errors": dict(record.errors.most_common(30)),
        "wrong": record.wrong, "faults": [asdict(fault) for fault in record.faults],
        "growth_mb": growth(record.samples), "samples": [asdict(one) for one in record.samples],
        "tokens_by_window": [record.tokens[index] for index in range(int(minutes * 60 / SAMPLE_SECONDS))],
        "exit_code": exit_code, "stop_seconds": stop_seconds, "left": left,
    }  # fmt: skip
    show(Console(width=100), result)
    where = "cpu" if gpu is None else gpu.lower().replace(" ", "_")
    write_result(out or RESULTS / f"soak_{model or 'embedded'}_{where}.json", result)
    if record.wrong or left or exit_code != 0 or any(fault.back_after is None for fault in record.faults):
        print(log_tail, file=sys.stderr)
        sys.exit(1)


def _gpu_name() -> str | None:
    if os.environ.get("LIGHTLLM_DEVICE") == "cpu":
        return None
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


if __name__ == "__main__":
    main()
