#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A worker whose device only tells the time: what the server carries, measured without a GPU.

    python -m perf.benchmark_serving --launch --model llama-7b --set worker_python=perf/sleeping_engine.py \
        --lengths perf/data/workload_2000.csv --request-rate 200 --processes 8

Everything is the server's and the worker's own but the runner: a step takes as long as LLaMA-7B's shape does on an H200
(perf/simulated_engine.py), or STEP_MS if the environment has it, so that pauses between tokens are the server's doing
alone. The tokens are drawn by chance. `max_total_token_num` is 229,000 unless it is set.
Called as an interpreter would be: `sleeping_engine.py -m lightllm_backend.worker.main SOCKET RANK`.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lightllm_backend.config import EngineConfig
from lightllm_backend.kv_pool.layer_groups import ONE_GROUP
from lightllm_backend.launch.embedded_model import embedded_model_directory
from lightllm_backend.lengths import LengthLimits
from lightllm_backend.messages.engine_messages import EngineInfo
from lightllm_backend.models.model_config import ModelConfig
from lightllm_backend.request import TOP_LOG_PROB
from lightllm_backend.router.batch import Batch, ScoredChunk, Scores, StepResult, TopLogProbs
from lightllm_backend.worker import main as worker
from perf.simulated_engine import step_seconds

VOCABULARY = 32000  # of which tokens are drawn; the model's own is no smaller
POOL_TOKENS = 229000
POSITIONS = 16384
SLOWDOWN = float(os.environ.get("SLEEPING_ENGINE_SLOWDOWN", "1"))  # for machines that carry less
STEP_MS = "STEP_MS"  # the environment's variable


def write_python(path: Path, **variables: object) -> Path:
    """Write what stands in for a worker's interpreter: this engine, in this environment with these variables."""
    settings = " ".join(f"{name}={value}" for name, value in variables.items())
    path.write_text(f'#!/bin/sh\n{settings} exec {sys.executable} {Path(__file__).resolve()} "$@"\n')
    path.chmod(0o755)
    return path


class SleepingStep:
    """A runner's PendingStep."""

    masks = None

    def __init__(self, result: StepResult, done_at: float) -> None:
        self._result, self._done_at = result, done_at

    def is_done(self) -> bool:
        return time.monotonic() >= self._done_at

    def result(self) -> StepResult:
        time.sleep(max(0.0, self._done_at - time.monotonic()))
        return self._result


class SleepingRunner:
    """Steps end one after the other."""

    overlap = 1

    def __init__(self, seconds_of: Callable[[Batch, int], float] = step_seconds) -> None:
        """seconds_of: how long a step takes, from its batch and its K and V in tokens."""
        self._seconds_of = seconds_of
        self._random = np.random.default_rng(0)
        self._free_at = 0.0
        self._num_top: dict[int, int] = {}  # by row, what its request asks for as top_logprobs

    def launch(self, batch: Batch) -> SleepingStep:
        seconds = SLOWDOWN * self._seconds_of(batch, int(batch.starts.sum()))
        self._free_at = max(self._free_at, time.monotonic()) + seconds
        count = int(batch.samples.sum())
        tokens = self._random.integers(3, VOCABULARY, count, dtype=np.int32)
        log_probs = np.zeros(count, dtype=np.float32)
        scores = tuple(_scores(chunk) for chunk in batch.scored)
        return SleepingStep(StepResult(tokens, log_probs, seconds, scores, self._likeliest(batch)), self._free_at)

    def release_all(self) -> None:
        """No step waits for masks."""

    def _likeliest(self, batch: Batch) -> TopLogProbs | None:
        self._num_top |= {one.row: one.sampling.top_logprobs for one in batch.admitted}
        wanted = np.array([self._num_top[row] for row in batch.rows[batch.samples].tolist()], dtype=np.int64)
        [samples] = wanted.nonzero()
        if not len(samples):
            return None
        pairs = np.zeros((len(samples), wanted.max()), dtype=TOP_LOG_PROB)
        pairs["token_id"] = np.arange(3, 3 + wanted.max())
        return TopLogProbs(samples, pairs)


def _scores(chunk: ScoredChunk) -> Scores:
    shape = chunk.num_tokens, chunk.num_top
    likeliest = np.tile(np.arange(3, 3 + chunk.num_top, dtype=np.int32), (chunk.num_tokens, 1))
    return Scores(np.zeros(shape[0], dtype=np.float32), likeliest, np.zeros(shape, dtype=np.float32))


class SleepingEngine:
    """What load.load_engine gives."""

    prefixes_are_alike = True
    recompute_at = None
    groups = ONE_GROUP

    def __init__(self, config: EngineConfig) -> None:
        milliseconds = float(os.environ.get(STEP_MS, "0"))
        self.runner = SleepingRunner(lambda *_: milliseconds / 1e3) if milliseconds else SleepingRunner()
        self.batch_max_tokens = config.batch_max_tokens or 8192
        pool_tokens = self.longest = config.max_total_token_num or POOL_TOKENS
        shape = ModelConfig.from_directory(config.model_dir or embedded_model_directory())
        self.info = EngineInfo(
            model="sleeping", dtype="none", device="cpu", vocab_size=shape.vocab_size, eos_ids=(2,),
            lengths=LengthLimits.of(config, POSITIONS, pool_tokens), pool_tokens=pool_tokens, memory={"KV pool": 0},
        )  # fmt: skip


if __name__ == "__main__":
    worker._load = lambda config, rank, address: SleepingEngine(config)  # noqa: SLF001
    del sys.argv[1:3]
    worker.main()
