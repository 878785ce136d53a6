# SPDX-License-Identifier: Apache-2.0
"""Engines of several ranks on a CPU, over gloo: the same tokens whatever the number, and how ranks start and die."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from lightllm_backend.config import EngineConfig
from lightllm_backend.engine.client import EngineClient
from lightllm_backend.engine.supervisor import EngineSupervisor
from lightllm_backend.engine.worker_group import EngineStartError
from lightllm_backend.request import FinishReason, Request, SamplingParams, TokenChunk
from tests.runner.engine_harness import save_random_llama, transformers_greedy

TIMEOUT = 120.0
MAX_TOKENS = 12
PROMPTS = [[5], [17, 3, 98, 42, 7], list(range(20, 61)), [190, 191, 192]]
SAMPLED = [
    SamplingParams(max_tokens=MAX_TOKENS, do_sample=True, temperature=1.2, seed=seed, **changes)
    for seed, changes in enumerate(
        [{"top_k": 20}, {"top_p": 0.8}, {"repetition_penalty": 1.3, "min_tokens": 4}, {"presence_penalty": 0.5}]
    )
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 heads share 2 KV heads, and neither 2 nor 4 ranks divide the vocabulary."""
    return save_random_llama(tmp_path_factory.mktemp("llama"), num_attention_heads=4, hidden_size=64)


@pytest.fixture(scope="module")
def expected(directory: Path) -> list[list[int]]:
    return transformers_greedy(directory, PROMPTS, MAX_TOKENS)


@dataclass
class Engine:
    supervisor: EngineSupervisor
    client: EngineClient

    def answer(self, prompts: Sequence[list[int]], sampling: Sequence[SamplingParams]) -> list[list[int]]:
        pending = [self.submit(prompt, params) for prompt, params in zip(prompts, sampling, strict=True)]
        return [one.tokens() for one in pending]

    def submit(self, prompt: list[int], sampling: SamplingParams) -> Pending:
        pending = Pending()
        self.client.submit(Request(self.client.new_uid(), tuple(prompt), sampling), pending.on_chunk)
        return pending


class Pending:
    """A request on its way."""

    def __init__(self) -> None:
        self.chunks: list[TokenChunk] = []
        self.started = threading.Event()
        self.ended = threading.Event()

    def on_chunk(self, chunk: TokenChunk) -> None:
        self.chunks.append(chunk)
        self.started.set()
        if chunk.finish_reason is not None:
            self.ended.set()

    def tokens(self) -> list[int]:
        assert self.ended.wait(TIMEOUT)
        assert self.chunks[-1].error is None, self.chunks[-1].error
        return [token for chunk in self.chunks for token in chunk.token_ids]


def configuration(directory: Path, tp: int, **changes: object) -> EngineConfig:
    settings = {
        "dtype": "float32", "device": "cpu", "running_max_req_size": 8, "max_total_token_num": 1024,
        "worker_python": sys.executable, **changes,
    }  # fmt: skip
    return EngineConfig(model_dir=str(directory), tp=tp, **settings)


@contextlib.contextmanager
def started(config: EngineConfig, on_restart: Callable[[], None] = lambda: None) -> Iterator[Engine]:
    with tempfile.TemporaryDirectory(prefix="lightllm-") as run_directory:
        address = str(Path(run_directory, "engine"))
        supervisor = EngineSupervisor(config, address, on_restart)
        client = None
        try:
            supervisor.wait_ready()
            client = EngineClient(address)
            client.wait_ready(TIMEOUT)
            yield Engine(supervisor, client)
        finally:
            if client:
                client.close()
            supervisor.stop()


def workers() -> list[psutil.Process]:
    """Children of this process that are workers and still run."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if "lightllm_backend.engine.worker" in child.cmdline():
                found.append(child)
    return found


def shared_memory() -> set[str]:
    return {entry.name for entry in Path("/dev/shm").iterdir()}


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_tokens_do_not_depend_on_the_number_of_ranks(directory, expected, sampled, tp) -> None:
    shared_before = shared_memory()
    with started(configuration(directory, tp)) as engine:
        assert len(engine.supervisor.pids) == len(workers()) == tp
        assert engine.answer(PROMPTS, [SamplingParams(max_tokens=MAX_TOKENS)] * len(PROMPTS)) == expected
        assert engine.answer(PROMPTS, SAMPLED) == sampled
    assert workers() == []
    assert shared_memory() <= shared_before


@pytest.fixture(scope="module")
def sampled(directory: Path, expected: list[list[int]]) -> list[list[int]]:
    with started(configuration(directory, 1)) as engine:
        tokens = engine.answer(PROMPTS, SAMPLED)
    assert all(ours != greedy for ours, greedy in zip(tokens, expected, strict=True)), "they are drawn"
    return tokens
