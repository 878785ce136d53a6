# SPDX-License-Identifier: Apache-2.0
"""Requests to a server that runs, many of which their clients leave, by every way there is; then, what is left.

    python -m lightllm_backend.serve --max_total_token_num 4000 --running_max_req_size 8
    python -m perf.cancellations --requests 600

The pool is small in the first line, so that requests also wait. Nobody else may use the server meanwhile.
"""

from __future__ import annotations

import http.client
import json
import random
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import psutil
from tqdm import tqdm

from lightllm_client import DeadlineExceeded, LightLLMClient, LightLLMError
from perf.serving.timeline import read_metrics

PROMPT = "Once upon a time, there was a"
LONG, SHORT = 400, 12  # tokens
LEFT_SHARE = 0.4
AT_ONCE = 24
AT_REST_SECONDS = 60.0
STREAMS_OF_A_PROCESS = 4

# A process that opens streams, says so, and waits to be killed.
DOOMED_PROCESS = f"""
import sys, time
from lightllm_client import LightLLMClient
clients = [LightLLMClient(sys.argv[1], max_retries=0) for _ in range({STREAMS_OF_A_PROCESS})]
streams = [client.stream({PROMPT!r}, max_tokens={LONG}, ignore_eos=True) for client in clients]
print("opened", flush=True)
time.sleep(600)
"""


class Visitor:
    """One kind of request after the other, as a user's client would make them."""

    def __init__(self, http_address: str, grpc_address: str) -> None:
        self._http_address = http_address
        self._grpc_address = grpc_address

    def whole(self) -> None:
        with LightLLMClient(self._grpc_address, timeout=600, max_retries=0) as client:
            client.generate(PROMPT, max_tokens=SHORT, ignore_eos=True)

    def stream_cancelled(self) -> None:
        with LightLLMClient(self._grpc_address, timeout=600, max_retries=0) as client:
            stream = client.stream(PROMPT, max_tokens=LONG, ignore_eos=True)
            self._read_some(stream)
            stream.close()

    def channel_closed(self) -> None:
        client = LightLLMClient(self._grpc_address, timeout=600, max_retries=0)
        self._read_some(client.stream(PROMPT, max_tokens=LONG, ignore_eos=True))
        client.close()

    def deadline(self) -> None:
        with LightLLMClient(self._grpc_address) as client:
            try:
                client.generate(PROMPT, max_tokens=LONG, ignore_eos=True, timeout=random.uniform(0.05, 1.0))
            except DeadlineExceeded:
                return

    def http_dropped(self) -> None:
        connection = http.client.HTTPConnection(self._http_address, timeout=600)
        body = {"text_input": PROMPT, "stream": True, "max_tokens": LONG, "ignore_eos": True}
        connection.request("POST", "/v2/models/lightllm/generate_stream", json.dumps(body))
        response = connection.getresponse()
        for _ in range(random.randrange(6)):
            response.readline()
        assert connection.sock
        connection.sock.shutdown(socket.SHUT_RDWR)
        response.close()
        connection.close()

    def process_killed(self) -> None:
        command = [sys.executable, "-c", DOOMED_PROCESS, self._grpc_address]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            assert process.stdout.readline() == "opened\n"
            time.sleep(random.uniform(0, 1.0))
            process.kill()

    @staticmethod
    def _read_some(stream: object) -> None:
        chunks = iter(stream)  # type: ignore[call-overload]
        for _ in range(random.choice((0, 0, 1, 5, 20))):
            next(chunks)


def seconds_until_rest(metrics_address: str) -> float | None:
    """How long it takes until no request holds anything of the engine; None if that does not come."""
    began = time.monotonic()
    while time.monotonic() < began + AT_REST_SECONDS:
        now = read_metrics(metrics_address)
        if not (now.running_requests or now.queued_requests or now.kv_tokens_used):
            return time.monotonic() - began
        time.sleep(0.05)
    return None


def resident_mebibytes(pid: int) -> dict[str, float]:
    """Find the launch command's descendants by what they are."""
    sizes: Counter[str] = Counter()
    for process in psutil.Process(pid).children(recursive=True):
        line = process.cmdline()
        models = {Path(argument).parent.parent.name for argument in line if argument.endswith("model.py")}
        name = next(iter(models), "worker" if "lightllm_backend.worker.main" in line else Path(line[0]).name)
        sizes[name] += process.memory_info().rss / 2**20
    return {name: round(size, 1) for name, size in sizes.items()}


@click.command(help=str(__doc__).partition("\n")[0])
@click.option("--requests", default=300, show_default=True, type=click.IntRange(min=10), help="that many")
@click.option("--http_address", default="127.0.0.1:8000", show_default=True, help="of the server")
@click.option("--grpc_address", default="127.0.0.1:8001", show_default=True, help="of the server")
@click.option("--metrics_address", default="127.0.0.1:8002", show_default=True, help="of the server")
@click.option("--pid", type=int, help="of the launch command, to tell the memory of the server's processes")
def main(requests: int, http_address: str, grpc_address: str, metrics_address: str, pid: int | None) -> None:
    visitor = Visitor(http_address, grpc_address)
    leaving = [visitor.stream_cancelled, visitor.channel_closed, visitor.deadline, visitor.http_dropped]
    chosen: list[Callable[[], None]] = []
    while len(chosen) < requests:
        left = random.random() < LEFT_SHARE
        chosen.append(random.choice(leaving) if left else visitor.whole)
    chosen[:: max(1, requests // 10)] = [visitor.process_killed] * len(chosen[:: max(1, requests // 10)])
    counts = Counter(way.__name__ for way in chosen)

    def make(way: Callable[[], None]) -> str | None:
        try:
            way()
        except (LightLLMError, OSError) as error:
            return f"{way.__name__}: {error}"
        return None

    for part in range(2):
        half = chosen[part::2]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            failures = [error for error in tqdm(pool.map(make, half), total=len(half), unit="request") if error]
        rest = seconds_until_rest(metrics_address)
        click.echo(
            f"half {part + 1}: {len(failures)} failed; at rest " + ("never" if rest is None else f"after {rest:.2f} s")
        )
        for error in failures[:5]:
            click.echo(error)
        if pid:
            click.echo(f"resident MiB: {resident_mebibytes(pid)}")
        assert rest is not None, read_metrics(metrics_address)
        assert not failures
    click.echo(", ".join(f"{count} {name}" for name, count in counts.most_common()))


if __name__ == "__main__":
    main()
