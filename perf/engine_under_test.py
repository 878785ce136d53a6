# SPDX-License-Identifier: Apache-2.0
"""An engine alone, without Triton server: a worker process and an EngineClient, driven with random prompts."""

from __future__ import annotations

import contextlib
import itertools
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lightllm_backend.config import EngineConfig
from lightllm_backend.engine.channel import EngineInfo
from lightllm_backend.engine.client import EngineClient
from lightllm_backend.engine.supervisor import EngineSupervisor
from lightllm_backend.request import Request, RequestError, SamplingParams, TokenChunk


@dataclass(frozen=True)
class BatchRun:
    """One batch of equal requests, all submitted at once, in wall-clock seconds."""

    seconds: float  # from the first submission to the last token of all
    step_seconds: float  # median time between two chunks of the request that was submitted last; 0 for one token


class EngineUnderTest:
    def __init__(self, client: EngineClient, info: EngineInfo, start_seconds: float) -> None:
        self.info = info
        self.start_seconds = start_seconds
        self._client = client
        self._random = random.Random(0)

    def run(self, batch: int, input_len: int, output_len: int) -> BatchRun:
        """Greedy, past any EOS. Every prompt is new, so that none is found in a cache."""
        vocabulary = range(self.info.vocab_size)
        return self.run_prompts(
            [tuple(self._random.choices(vocabulary, k=input_len)) for _ in range(batch)], output_len
        )

    def run_prompts(self, prompts: list[tuple[int, ...]], output_len: int) -> BatchRun:
        sampling = SamplingParams(max_tokens=output_len, ignore_eos=True)
        requests = [Request(self._client.new_uid(), prompt, sampling) for prompt in prompts]
        last_uid = requests[-1].uid
        running = {request.uid for request in requests}
        errors: list[RequestError] = []
        times: list[float] = []
        done = threading.Event()

        def on_chunk(chunk: TokenChunk) -> None:
            if chunk.uid == last_uid:
                times.append(time.perf_counter())
            if chunk.finish_reason is not None:
                errors.extend([chunk.error] if chunk.error else [])
                running.discard(chunk.uid)
                if not running:
                    done.set()

        started = time.perf_counter()
        for request in requests:
            self._client.submit(request, on_chunk)
        done.wait()
        seconds = time.perf_counter() - started
        if errors:
            raise errors[0]
        gaps = [after - before for before, after in itertools.pairwise(times)]
        return BatchRun(seconds, statistics.median(gaps) if gaps else 0.0)


@contextlib.contextmanager
def engine_under_test(config: EngineConfig) -> Iterator[EngineUnderTest]:
    with tempfile.TemporaryDirectory(prefix="lightllm-") as directory:
        address = str(Path(directory, "engine"))
        started = time.monotonic()
        supervisor = EngineSupervisor(config, address)
        client = None
        try:
            supervisor.wait_ready()
            start_seconds = time.monotonic() - started
            client = EngineClient(address)
            yield EngineUnderTest(client, client.wait_ready(10), start_seconds)
        finally:
            if client:
                client.close()
            supervisor.stop()
