# SPDX-License-Identifier: Apache-2.0
"""The engine that only tells the time: its steps end in order, and it serves as a worker."""

import time

import numpy as np

from lightllm_backend.config import EngineConfig
from lightllm_backend.request import SamplingParams
from lightllm_backend.router.batch import Admission, Batch, ScoredChunk
from perf.engine_under_test import engine_under_test
from perf.simulated_engine import step_seconds
from perf.sleeping_engine import SleepingRunner, write_python


def decodes(count: int) -> Batch:
    one = np.ones(count, dtype=np.int32)
    admitted = (Admission(1, (5,), SamplingParams()),)
    return Batch(one, one, one, one[np.newaxis], np.ones(count, dtype=np.bool_), num_decodes=count, admitted=admitted)


def test_a_step_begins_when_the_one_before_has_ended():
    runner, began = SleepingRunner(), time.monotonic()
    steps = [runner.launch(decodes(count)) for count in (3, 5)]
    results = [step.result() for step in steps]
    assert time.monotonic() - began >= 2 * step_seconds(decodes(3), 3)
    assert all(step.is_done() for step in steps)
    assert [len(result.token_ids) for result in results] == [3, 5]


def test_it_knows_log_probabilities_of_prompts_and_of_the_likeliest_tokens():
    rows, ones = np.arange(2, dtype=np.int32), np.ones(2, dtype=np.int32)
    admitted = tuple(Admission(row, (5,), SamplingParams(top_logprobs=2 * row)) for row in (0, 1))
    batch = Batch(rows, ones, ones, ones[np.newaxis], np.ones(2, dtype=np.bool_), 2, admitted, (ScoredChunk(0, 3, 2),))
    result = SleepingRunner().launch(batch).result()
    assert [array.shape for array in result.scores[0]] == [(3,), (3, 2), (3, 2)]
    assert result.top_log_probs is not None
    assert list(result.top_log_probs.by_sample()) == [1]


def test_it_serves_as_a_worker_whose_tokens_take_their_time(tmp_path):
    python = write_python(tmp_path / "python")
    with engine_under_test(EngineConfig(worker_python=str(python), max_total_token_num=1000)) as engine:
        assert engine.info.pool_tokens == 1000
        run = engine.run([5, 7], 4)
        assert run.seconds > 4 * step_seconds(decodes(2), 12)
