# SPDX-License-Identifier: Apache-2.0
"""An engine alone, without Triton server: a worker process and an EngineClient, driven with random prompts."""

from __future__ import annotations

import contextlib
import itertools
import queue
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightllm_backend.config import EngineConfig
from lightllm_backend.generation.engine_client import EngineClient
from lightllm_backend.generation.supervisor import EngineSupervisor
from lightllm_backend.messages.engine_messages import EngineInfo
from lightllm_backend.request import PromptLogProbs, Request, RequestError, SamplingParams, TokenChunk
from lightllm_backend.router.statistics import EngineStats
from lightllm_backend.worker.server import STATS_SECONDS


@dataclass(frozen=True)
class BatchRun:
    """One batch of requests that generate equally many tokens, all submitted at once, in wall-clock seconds."""

    seconds: float  # from the first submission to the last token of all
    # Median time between two chunks of the request that was submitted last, until any has ended; 0 if there are none.
    step_seconds: float
    most_running: int  # requests that had begun and not ended
    device_seconds: float  # that the device computed


class EngineUnderTest:
    def __init__(
        self, client: EngineClient, info: EngineInfo, start_seconds: float, stats: Callable[[], EngineStats]
    ) -> None:
        self.info = info
        self.start_seconds = start_seconds
        self._client = client
        self._stats = stats
        self._resting: EngineStats | None = None  # after the last run, as before the next one
        self._random = random.Random(0)

    def run(self, prompt_lengths: Sequence[int], output_len: int) -> BatchRun:
        """Greedy, past any EOS. Every prompt is new, so that none is found in a cache."""
        vocabulary = range(self.info.vocab_size)
        return self.run_prompts([tuple(self._random.choices(vocabulary, k=n)) for n in prompt_lengths], output_len)

    def run_prompts(self, prompts: list[tuple[int, ...]], output_len: int) -> BatchRun:
        sampling = SamplingParams(max_tokens=output_len, ignore_eos=True)
        requests = [Request(self._client.new_uid(), prompt, sampling) for prompt in prompts]
        watch = _Watch([request.uid for request in requests])
        before = self._resting or self._at_rest()
        started = time.perf_counter()
        for request in requests:
            self._client.submit(request, watch.on_chunk)
        watch.done.wait()
        seconds = time.perf_counter() - started
        self._resting = self._at_rest()
        if watch.errors:
            raise watch.errors[0]
        gaps = [later - sooner for sooner, later in itertools.pairwise(watch.times)]
        device_seconds = self._resting.device_seconds_total - before.device_seconds_total
        return BatchRun(seconds, statistics.median(gaps) if gaps else 0.0, watch.most_running, device_seconds)

    def prompt_log_probs(self, prompt: tuple[int, ...]) -> PromptLogProbs:
        """Those of a prompt's tokens but the first; nothing is generated."""
        sampling = SamplingParams(max_tokens=0, prompt_logprobs=0)
        answer: queue.SimpleQueue[TokenChunk] = queue.SimpleQueue()
        self._client.submit(Request(self._client.new_uid(), prompt, sampling), answer.put)
        chunk = answer.get()
        if chunk.error:
            raise chunk.error
        assert chunk.prompt_log_probs is not None, "they come with the first chunk"
        return chunk.prompt_log_probs

    def _at_rest(self) -> EngineStats:
        """The engine's statistics when all is done. It tells them a little later, and when they change."""
        latest = self._stats()
        while True:
            time.sleep(2 * STATS_SECONDS)
            latest, before = self._stats(), latest
            if latest == before:
                return latest


class _Watch:
    """What the chunks of one batch tell, as the client's thread hands them over."""

    def __init__(self, uids: list[str]) -> None:
        self.done = threading.Event()
        self.errors: list[RequestError] = []
        self.times: list[float] = []  # of the chunks of the last request, until any request has ended
        self.most_running = 0
        self._last = uids[-1]
        self._waiting, self._running = set(uids), set[str]()
        self._any_ended = False

    def on_chunk(self, chunk: TokenChunk) -> None:
        if chunk.uid == self._last and not self._any_ended:
            self.times.append(time.perf_counter())
        if chunk.uid in self._waiting:
            self._waiting.discard(chunk.uid)
            self._running.add(chunk.uid)
            self.most_running = max(self.most_running, len(self._running))
        if chunk.finish_reason is not None:
            self.errors.extend([chunk.error] if chunk.error else [])
            self._any_ended = True
            self._running.discard(chunk.uid)
            if not self._running and not self._waiting:
                self.done.set()


@contextlib.contextmanager
def engine_under_test(config: EngineConfig) -> Iterator[EngineUnderTest]:
    started = time.monotonic()
    latest = [EngineStats()]
    with engine_client(config, on_stats=lambda stats: latest.__setitem__(0, stats)) as client:
        yield EngineUnderTest(client, client.wait_ready(), time.monotonic() - started, lambda: latest[0])


@contextlib.contextmanager
def engine_client(
    config: EngineConfig, on_stats: Callable[[EngineStats], None] = lambda stats: None
) -> Iterator[EngineClient]:
    """A client of an engine that is ready and lives as long as the block."""
    with tempfile.TemporaryDirectory(prefix="lightllm-") as directory:
        address = str(Path(directory, "engine"))
        supervisor = EngineSupervisor(config, address)
        client = None
        try:
            supervisor.wait_ready()
            client = EngineClient(address, on_stats)
            client.wait_ready(10)
            yield client
        finally:
            if client:
                client.close()
            supervisor.stop()
