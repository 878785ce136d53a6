# SPDX-License-Identifier: Apache-2.0
"""Engines of several ranks on a CPU, over gloo: the same tokens whatever the number, and how ranks start and die."""

from __future__ import annotations

import copy
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import transformers

from lightllm_backend.generation.worker_group import EngineStartError
from lightllm_backend.messages.engine_messages import ENGINE_STOPPED
from lightllm_backend.models.errors import ModelError
from lightllm_backend.request import FinishReason, SamplingParams
from lightllm_backend.text.tokenizer import Tokenizer
from lightllm_backend.worker.load import load_engine
from tests.polling import poll
from tests.runner.engine_harness import save_random_llama, transformers_greedy
from tests.runner.test_layer_groups import MODELS
from tests.runner.test_prompt_scores import check
from tests.worker.process_harness import TIMEOUT, configuration, started, workers

MAX_TOKENS = 12
PROMPTS = [[5], [17, 3, 98, 42, 7], list(range(20, 61)), [190, 191, 192]]
SAMPLED = [
    SamplingParams(max_tokens=MAX_TOKENS, do_sample=True, temperature=1.2, seed=seed, **changes)
    for seed, changes in enumerate(
        [
            {"top_k": 20}, {"top_p": 0.8}, {"repetition_penalty": 1.3, "min_tokens": 4}, {"presence_penalty": 0.5},
            {"structured_output": '{"regex":"(ab|c)*"}'}, {"structured_output": '{"json_object":true}'},
        ]
    )
]  # fmt: skip
SAMPLED_PROMPTS = PROMPTS + PROMPTS[:2]
TOKENIZER = Path(__file__).parents[1] / "data" / "llama" / "tokenizer.json"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 heads share 2 KV heads, and neither 2 nor 4 ranks divide the vocabulary."""
    made = tmp_path_factory.mktemp("llama")
    shutil.copy(TOKENIZER, made)
    return save_random_llama(made, num_attention_heads=4, hidden_size=64, vocab_size=517)


@pytest.fixture(scope="module")
def expected(directory: Path) -> list[list[int]]:
    return transformers_greedy(directory, PROMPTS, MAX_TOKENS)


def shared_memory() -> set[str]:
    """All that is there but what other programs on the machine may have: Triton servers, and multiprocessing."""
    return {entry.name for entry in Path("/dev/shm").iterdir() if not entry.name.startswith(("triton_", "sem.mp-"))}


def test_tokens_do_not_depend_on_the_number_of_ranks_and_idle_ranks_use_no_processor(
    directory, expected, sampled
) -> None:
    """Those of two ranks are looked at where one of them is killed."""
    tp = 4
    shared_before = shared_memory()
    with started(configuration(directory, tp)) as engine:
        assert len(engine.supervisor.pids) == len(workers()) == tp
        greedy = engine.answer(PROMPTS, SamplingParams(max_tokens=MAX_TOKENS))
        assert [answer.tokens for answer in greedy] == expected
        assert [answer.tokens for answer in engine.answer(SAMPLED_PROMPTS, SAMPLED)] == sampled
        asking = SamplingParams(max_tokens=0, prompt_logprobs=3)
        for prompt, answer in zip(PROMPTS, engine.answer(PROMPTS, asking), strict=True):
            check(directory, prompt, 3, answer.chunks[0].prompt_log_probs)
        ranks = [psutil.Process(pid) for pid in engine.supervisor.pids]
        before = [sum(one.cpu_times()[:2]) for one in ranks]
        time.sleep(2)
        used = [sum(one.cpu_times()[:2]) - start for one, start in zip(ranks, before, strict=True)]
        assert max(used[1:]) < 0.2, "a follower waits without looking, and one that looks uses two seconds"
        assert used[0] < 0.5
    assert workers() == []
    assert shared_memory() <= shared_before


def test_every_rank_gives_back_what_is_behind_the_window(tmp_path: Path) -> None:
    shutil.copy(TOKENIZER, tmp_path)
    shape = copy.copy(MODELS["most"])
    shape.vocab_size = 517
    torch.manual_seed(7)
    transformers.AutoModelForCausalLM.from_config(shape).save_pretrained(tmp_path)
    expected = transformers_greedy(tmp_path, PROMPTS, MAX_TOKENS)
    # Two layers without a window and five with one of 8: longer than the pool is wide.
    settings = {"prefix_cache": False, "max_total_token_num": 36, "batch_max_tokens": 9}
    with started(configuration(tmp_path, 2, **settings)) as engine:
        greedy = engine.answer(PROMPTS, SamplingParams(max_tokens=MAX_TOKENS))
    assert [answer.tokens for answer in greedy] == expected


@pytest.fixture(scope="module")
def sampled(directory: Path, expected: list[list[int]]) -> list[list[int]]:
    with started(configuration(directory, 1)) as engine:
        greedy = engine.answer(PROMPTS, SamplingParams(max_tokens=MAX_TOKENS))
        tokens = [answer.tokens for answer in engine.answer(SAMPLED_PROMPTS, SAMPLED)]
    assert [answer.tokens for answer in greedy] == expected
    assert all(ours != greedy for ours, greedy in zip(tokens, expected, strict=False)), "they are drawn"
    constrained = [Tokenizer.load(directory).decode(ids) for ids in tokens[len(PROMPTS) :]]
    assert set(constrained[0]) <= set("abc")
    assert constrained[1].startswith("{")
    return tokens


def test_a_rank_that_fails_at_start_fails_the_start_with_its_error(directory, tmp_path) -> None:
    # Rank 0 waits for rank 1 when that gives up.
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\nif [ "$4" = 1 ]; then sleep 3; echo "error: MemoryError: the GPU is full"; exit 1; fi\n'
        f'exec "{sys.executable}" "$@"\n'
    )
    python.chmod(0o755)
    began = time.monotonic()
    failing = configuration(directory, 2, worker_python=str(python))
    with pytest.raises(EngineStartError, match="^rank 1: MemoryError: the GPU is full$"), started(failing):
        pass
    assert workers() == []
    assert time.monotonic() - began < 40, "rank 0 was not waited for"


def test_what_cannot_be_split_is_an_error_at_start(directory) -> None:
    with pytest.raises(ModelError, match="tp is 3; allowed: 1, 2, 4, since the model has 4 attention heads"):
        load_engine(configuration(directory, 3))


def test_a_rank_that_is_killed_ends_the_requests_and_the_engine_comes_back(directory, expected) -> None:
    """Here rank 0, which has the Router; in test_step_failures another rank ends."""
    restarts: list[float] = []
    with started(configuration(directory, 2), lambda: restarts.append(time.monotonic())) as engine:
        first = engine.supervisor.pids
        running = [engine.submit(prompt, SamplingParams(max_tokens=200, ignore_eos=True)) for prompt in PROMPTS[:2]]
        assert all(one.started.wait(TIMEOUT) for one in running)
        os.kill(first[0], signal.SIGKILL)
        assert all(one.ended.wait(TIMEOUT) for one in running)
        assert {str(one.chunks[-1].error) for one in running} == {str(ENGINE_STOPPED)}
        for one in running:
            assert [chunk.finish_reason for chunk in one.chunks if chunk.finish_reason] == [FinishReason.FAILED]
        assert poll(lambda: len(restarts) == 1 and engine.client.up, TIMEOUT)
        assert not set(first) & set(engine.supervisor.pids)
        assert not any(psutil.pid_exists(pid) for pid in first)
        assert len(workers()) == 2
        [answer] = engine.answer(PROMPTS[1:2], SamplingParams(max_tokens=MAX_TOKENS))
        assert answer.tokens == expected[1]
    assert len(restarts) == 1
    assert workers() == []


OWNER = """
import sys
from lightllm_backend.config import EngineConfig
from lightllm_backend.generation.supervisor import EngineSupervisor
supervisor = EngineSupervisor(EngineConfig.build(dict(zip(sys.argv[2::2], sys.argv[3::2])), {}), sys.argv[1])
supervisor.wait_ready()
print(*supervisor.pids, flush=True)
input()
"""


def test_the_ranks_end_when_their_owner_is_killed(directory, tmp_path) -> None:
    settings = configuration(directory, 2).environment()
    flat = [text for name, value in settings.items() for text in (name.removeprefix("LIGHTLLM_").lower(), value)]
    command = [sys.executable, "-c", OWNER, str(tmp_path / "engine"), *flat]
    root = str(Path(__file__).parents[2])
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root) as owner:
        pids = [int(pid) for pid in owner.stdout.readline().split()]
        assert len(pids) == 2
        owner.kill()
    assert poll(lambda: not any(psutil.pid_exists(pid) for pid in pids), TIMEOUT)
