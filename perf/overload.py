# SPDX-License-Identifier: Apache-2.0
"""A flood of requests at once against a small queue: how soon the excess is refused, and what running streams notice.

    python -m perf.overload --protocol grpc --requests 5000 --set max_queue_size=500

The engine only tells the time (perf/sleeping_engine.py) in steps that are all alike, so the figures are the server's.
Streams run for some seconds before the flood and through it. The flood comes from a process of its own; a request's
time counts from its sending. CPU seconds say what the flood costs each process, whatever else the machine does, and
megabytes by how much each has grown. Then
the same flood goes to a Triton server with an ensemble of one model that only refuses, and another model that streams
at the same pace and does nothing else: no refusal by a Python model in an ensemble comes sooner, and no stream is held
up less.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import re
import subprocess
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil

from lightllm_backend.launch.http_sockets import enlarge_message_buffers
from lightllm_backend.triton_server.executable import command
from lightllm_client.errors import LightLLMError
from perf.model_directory import write_model_directory
from perf.record import RESULTS, circumstances, write_result
from perf.serving.calls import Target, caller_for
from perf.serving.measure import RequestFailed
from perf.serving.systems import free_ports, launched_server, wait_ready
from perf.serving.workload import Length, WorkItem
from perf.sleeping_engine import STEP_MS

# So few run at once that the engine's queue fills, and not the server before it.
SETTINGS = {
    "worker_python": "perf/sleeping_engine.py", "load_format": "dummy", "running_max_req_size": "64",
    "max_queue_size": "500",
}  # fmt: skip
MODEL = "llama-7b"
PROCESSES = {
    "tokenizer": r"model_repository/tokenizer/", "generation": r"model_repository/generation/",
    "detokenizers": r"model_repository/detokenizer/", "worker": r"worker\.main", "tritonserver": r"/tritonserver ",
    "the flood's client": r"multiprocessing\.spawn",
}  # fmt: skip
CALM_SECONDS = 4.0  # the streams alone
INTAKE_SECONDS = 2.0  # in which a flood that is not refused has come in
ROOT = Path(__file__).resolve().parents[1]
REFUSING, STREAMING = "refusing", "streaming"
STREAM_LENGTH = 15_000  # tokens, more than a stream gets
REFUSING_MODEL = """
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        error = pb_utils.TritonError("the queue is full", pb_utils.TritonError.UNAVAILABLE)
        for request in requests:
            response = pb_utils.InferenceResponse(error=error)
            request.get_response_sender().send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""
STREAMING_MODEL = """
import os, threading, time
import numpy as np
import triton_python_backend_utils as pb_utils

def tensors():
    for name in ("text_output", "finish_reason"):
        yield pb_utils.Tensor(name, np.array([b" word" if name == "text_output" else b""], dtype=object))
    for name in ("num_input_tokens", "num_output_tokens", "output_ids"):
        yield pb_utils.Tensor(name, np.ones(1, dtype=np.int32))
    yield pb_utils.Tensor("output_log_probs", np.empty(0, dtype=np.float32))
    yield pb_utils.Tensor("cumulative_logprob", np.zeros(1, dtype=np.float32))

class TritonPythonModel:
    def initialize(self, args):
        self.senders = []
        threading.Thread(target=self.send, daemon=True).start()

    def execute(self, requests):
        self.senders += [request.get_response_sender() for request in requests]

    def send(self):
        due = time.monotonic()
        while True:
            for sender in self.senders:
                sender.send(pb_utils.InferenceResponse(list(tensors())))
            due += float(os.environ["STEP_MS"]) / 1e3
            time.sleep(max(0.0, due - time.monotonic()))
"""

Answered = tuple[str, float, float]  # what became of a request, when it was sent, after how many seconds it ended


async def ask_all(target: Target, count: int, output: int) -> list[Answered]:
    """Send all requests at once, on one channel or on a connection each."""
    async with caller_for(target) as caller:
        payload = caller.payload(WorkItem("Once upon a time", Length(4, output)))

        async def ask() -> Answered:
            sent = time.monotonic()
            try:
                async for _ in caller.ask(payload):
                    pass
                outcome = "done"
            except (RequestFailed, LightLLMError) as error:
                outcome = "refused" if "the queue is full" in str(error) else f"failed: {str(error)[:80]}"
            return outcome, sent, time.monotonic() - sent

        return await asyncio.gather(*[ask() for _ in range(count)])


def flood(target: Target, count: int, output: int) -> list[Answered]:
    return asyncio.run(ask_all(target, count, output))


async def stream_until(target: Target, done: asyncio.Event) -> list[float]:
    """The times of the chunks of one stream."""
    async with caller_for(target) as caller:
        times = []
        async for _ in caller.ask(caller.payload(WorkItem("Once upon a time", Length(4, STREAM_LENGTH)))):
            times.append(time.monotonic())
            if done.is_set():
                break
    return times


async def measure(
    target: Target, count: int, output: int, streams: int, pool: ProcessPoolExecutor, streaming_model: str = "lightllm"
) -> dict[str, Any]:
    """Flood the target while streams of a model run."""
    loop = asyncio.get_running_loop()
    await loop.run_in_executor(pool, flood, target, 1, 1)  # the process has imported what it needs
    done = asyncio.Event()
    streaming = replace(target, streaming=True, model=streaming_model)
    running = [asyncio.create_task(stream_until(streaming, done)) for _ in range(streams)]
    await asyncio.sleep(CALM_SECONDS)
    cpu_before, memory_before = cpu_seconds(), megabytes()
    answered = await loop.run_in_executor(pool, flood, target, count, output)
    cpu_after, memory_after = cpu_seconds(), megabytes()
    done.set()
    times = await asyncio.gather(*running)
    begun, ended = min(sent for _, sent, _ in answered), max(sent + seconds for _, sent, seconds in answered)
    refused_until = max((sent + s for outcome, sent, s in answered if outcome == "refused"), default=begun)
    return {
        "outcomes": dict(Counter(outcome for outcome, _, _ in answered)),
        "seconds": ended - begun,
        "sending_seconds": max(sent for _, sent, _ in answered) - begun,
        "refused_seconds": percentiles([seconds for outcome, _, seconds in answered if outcome == "refused"]),
        "done_seconds": percentiles([seconds for outcome, _, seconds in answered if outcome == "done"]),
        "cpu_seconds": {name: round(cpu_after[name] - cpu_before[name], 2) for name in sorted(cpu_before)},
        "grown_mb": {role: round(size - memory_before.get(role, size), 1) for role, size in memory_after.items()},
        "gap_before": percentiles(gaps(times, begun - CALM_SECONDS / 2, begun)),
        "gap_while_refusing": percentiles(gaps(times, begun, max(refused_until, begun + 0.5))),
        "gap_while_waiting": percentiles(gaps(times, max(refused_until, begun + INTAKE_SECONDS), ended)),
        "gap_during": percentiles(gaps(times, begun, ended)),
    }


@contextlib.contextmanager
def refusing_server(target: Target, repository: Path) -> Iterator[Target]:
    """Triton server with the ensemble's inputs and outputs: an ensemble of its name, of whose one step refuses all
    requests, and STREAMING, which answers them in steps."""
    ensemble = (ROOT / "model_repository" / "lightllm" / "config.pbtxt").read_text(encoding="utf-8")
    interface, _, _ = ensemble.partition("ensemble_scheduling")
    decoupled = "\nmodel_transaction_policy { decoupled: true }\ninstance_group [{ kind: KIND_CPU }]\n"
    for name, source in ((REFUSING, REFUSING_MODEL), (STREAMING, STREAMING_MODEL)):
        program = repository / name / "1" / "model.py"
        program.parent.mkdir(parents=True)
        program.write_text(source, encoding="utf-8")
        config = interface.replace('platform: "ensemble"', 'backend: "python"') + decoupled
        (repository / name / "config.pbtxt").write_text(config, encoding="utf-8")
    inputs, outputs = (re.findall(r'name: "(\w+)"', part) for part in interface.split("\noutput ["))
    maps = [f'input_map {{ key: "{name}", value: "{name}" }}' for name in inputs]
    maps += [f'output_map {{ key: "{name}", value: "{name}" }}' for name in outputs]
    step = "\n".join([f'model_name: "{REFUSING}"', "model_version: -1", *maps])
    (repository / "lightllm" / "1").mkdir(parents=True)
    (repository / "lightllm" / "config.pbtxt").write_text(
        f"{interface}\nensemble_scheduling {{ step [{{\n{step}\n}}] }}\n", encoding="utf-8"
    )
    http_port, grpc_port, metrics_port = free_ports(3)
    services = {"http": http_port, "grpc": grpc_port, "metrics": metrics_port}
    ports = [f"--{name}-port={port}" for name, port in services.items()]
    argv, environment = command(
        [f"--model-repository={repository}", *(f"--{name}-address=127.0.0.1" for name in services), *ports]
    )
    with (repository.parent / "log").open("wb") as log:
        process = subprocess.Popen(argv, env=environment, stdout=log, stderr=log)
    try:
        wait_ready(process, {http_port: "/v2/health/ready", metrics_port: "/metrics"}, Path(log.name))
        enlarge_message_buffers(process.pid)
        yield replace(target, address=f"127.0.0.1:{services[target.protocol]}")
    finally:
        process.kill()
        process.wait()


def cpu_seconds() -> Counter[str]:
    """What the processes that this one has started have used so far: the server's, by model, and the flood's."""
    used: Counter[str] = Counter()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            command = " ".join(process.cmdline())
            name = next((name for name, pattern in PROCESSES.items() if re.search(pattern, command)), "others")
            used[name] += sum(process.cpu_times()[:2])
    return used


def megabytes() -> dict[str, float]:
    """The resident memory of the server's processes, by role."""
    roles = {name: pattern for name, pattern in PROCESSES.items() if "client" not in name}
    used: defaultdict[str, float] = defaultdict(float)
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            arguments = " ".join(process.cmdline())
            for name, pattern in roles.items():
                if re.search(pattern, arguments):
                    used[name] += process.memory_info().rss / 2**20
    return dict(used)


def gaps(times: Sequence[Sequence[float]], begin: float, end: float) -> list[float]:
    """The pauses between two chunks of a stream that lie between two moments, in part or whole."""
    return [
        after - before
        for stream in times
        for before, after in itertools.pairwise(stream)
        if after > begin and before < end
    ]


def percentiles(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    names = {"p50": 50, "p99": 99, "p99.9": 99.9, "max": 100}
    return {name: float(np.percentile(values, percent)) for name, percent in names.items()}


@click.command()
@click.option("--protocol", type=click.Choice(["grpc", "http"]), default="grpc", show_default=True)
@click.option("--requests", default=5000, show_default=True)
@click.option("--output_len", default=128, show_default=True, help="tokens of each answer")
@click.option("--streams", default=8, show_default=True, help="streams that run meanwhile")
@click.option("--step_ms", default=5.0, show_default=True, help="how long each step of the engine takes")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="a setting of the engine")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "overload.json", show_default=True)
def main(
    protocol: str, requests: int, output_len: int, streams: int, step_ms: float, settings: Sequence[str], out: Path
) -> None:
    """Flood a server with requests and print how they ended."""
    os.environ[STEP_MS] = str(step_ms)
    given = dict(setting.split("=", 1) for setting in settings)
    target = Target(protocol, "", streaming=False)
    with tempfile.TemporaryDirectory() as scratch, ProcessPoolExecutor(1, get_context("spawn")) as pool:
        write_model_directory(MODEL, Path(scratch))
        with launched_server({**SETTINGS, "model_dir": scratch, **given}, target, 1) as server:
            result = asyncio.run(measure(server.target, requests, output_len, streams, pool))
        with refusing_server(target, Path(scratch, "models")) as refusing:
            bare = asyncio.run(measure(refusing, requests, output_len, streams, pool, STREAMING))
        result["model_that_only_refuses"] = bare
    for name, value in result.items():
        click.echo(f"{name}: {value}")
    write_result(
        out,
        {
            "benchmark": "overload",
            **circumstances(None),
            "protocol": protocol,
            "requests": requests,
            "step_ms": step_ms,
            "settings": given,
            **result,
        },
    )


if __name__ == "__main__":
    main()
