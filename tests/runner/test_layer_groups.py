# SPDX-License-Identifier: Apache-2.0
"""Layers with a window give back what no query sees: the tokens stay those of transformers, and the pool holds less."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from lightllm_backend.config import EngineConfig
from lightllm_backend.request import SamplingParams
from lightllm_backend.router.admission import AdmissionPolicy, ExactAdmission
from lightllm_backend.router.router import Router
from lightllm_backend.worker.load import LoadedEngine
from lightllm_backend.worker.main import build_router
from tests.router.test_preemption import RecklessAdmission
from tests.runner.engine_harness import load, run, transformers_greedy

WINDOW, MAX_TOKENS = 8, 20
SHAPE = {
    "vocab_size": 199, "hidden_size": 64, "intermediate_size": 56, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "sliding_window": WINDOW, "initializer_range": 0.3, "eos_token_id": 2,
}  # fmt: skip
MODELS = {
    "all": transformers.MistralConfig(**SHAPE, num_hidden_layers=3),
    # The kinds of layers have rotary embeddings of their own.
    "half": transformers.Gemma3TextConfig(
        **SHAPE, num_hidden_layers=4, head_dim=16, query_pre_attn_scalar=24, sliding_window_pattern=2
    ),
    # Two layers in each group, of which the last has but one.
    "most": transformers.Qwen2Config(
        **SHAPE, num_hidden_layers=7, use_sliding_window=True,
        layer_types=[f"{'full' if layer in (2, 5) else 'sliding'}_attention" for layer in range(7)],
    ),
}  # fmt: skip
SOURCE = random.Random(5)
# From one token to many windows.
PROMPTS = [[SOURCE.randrange(3, 199) for _ in range(length)] for length in (30, 61, 1, 7, 64, 2, 8, 9, 90, 5, 1, 44, 3)]
GREEDY = SamplingParams(max_tokens=MAX_TOKENS)


@pytest.fixture(scope="module", params=list(MODELS))
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(7)
    transformers.AutoModelForCausalLM.from_config(MODELS[request.param]).save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def expected(directory: Path) -> list[list[int]]:
    return transformers_greedy(directory, PROMPTS, MAX_TOKENS)


def router_for(engine: LoadedEngine, policy: AdmissionPolicy, batch_max_tokens: int, spare_slots: int) -> Router:
    """One that makes NaN of whatever becomes free, with some slots more than the longest sequence needs alone."""
    capacity = engine.groups.most_held(max(map(len, PROMPTS)) + MAX_TOKENS - 1, batch_max_tokens) + spare_slots
    router = Router(
        capacity, 16, batch_max_tokens, len(PROMPTS), frozenset({2}), policy=policy, prefix_cache=False,
        groups=engine.groups,
    )  # fmt: skip
    router.on_free(engine.storage.poison)
    engine.storage.poison(np.arange(engine.info.pool_tokens * engine.groups.count, dtype=np.int32))
    return router


@pytest.mark.parametrize(
    ("policy", "batch_max_tokens", "spare_slots", "overlap"),
    [(ExactAdmission, 200, 500, 1), (ExactAdmission, 11, 0, 0), (RecklessAdmission, 19, 0, 1)],
)
def test_tokens_are_those_of_transformers(
    directory: Path, expected: list[list[int]], policy: type, batch_max_tokens: int, spare_slots: int, overlap: int
) -> None:
    engine = load(directory, prefix_cache=False)
    assert engine.groups.num_windowed > 0
    router = router_for(engine, policy(), batch_max_tokens, spare_slots)
    arrivals = [index // 3 for index in range(len(PROMPTS))]
    answers = run(engine, PROMPTS, GREEDY, arrivals, overlap=overlap, router=router)
    assert [answer.token_ids for answer in answers] == expected
    # Where all layers have a window, sequences stop growing before anybody is in need.
    grows = engine.groups.num_full > 0
    assert (router.stats().preemptions_total > 0) == (policy is RecklessAdmission and grows)


def test_int8_is_as_without_groups(directory: Path) -> None:
    """Step by step in the same batches, so that nothing is rounded otherwise."""
    sampling = SamplingParams(max_tokens=MAX_TOKENS, do_sample=True, seed=3)
    grouped, whole = load(directory, kv_dtype="int8", prefix_cache=False), load(directory, kv_dtype="int8")
    assert (grouped.groups.num_windowed > 0, whole.groups.num_windowed) == (True, 0)
    ours, others = (
        run(engine, PROMPTS, sampling, router=router_for(engine, ExactAdmission(), 23, 3000))
        for engine in (grouped, whole)
    )
    assert [answer.token_ids for answer in ours] == [answer.token_ids for answer in others]


def test_a_sequence_may_be_longer_than_the_pool_holds_without_windows(directory: Path) -> None:
    settings = {"max_total_token_num": 100, "batch_max_tokens": 16}
    whole = load(directory, **settings)
    engine = load(directory, prefix_cache=False, **settings)
    groups, capacity = engine.groups, 100 * engine.groups.count
    assert whole.info.lengths.max_total == 101
    longest = engine.info.lengths.max_total
    assert longest == min(256, (capacity - groups.num_windowed * 23) // groups.num_full + 1 if groups.num_full else 256)
    prompt = [SOURCE.randrange(3, 199) for _ in range(longest - 10)]
    config = EngineConfig(running_max_req_size=16, prefix_cache=False)
    router = build_router(config, engine.info, engine.batch_max_tokens, groups=groups)
    router.on_free(engine.storage.poison)
    [answer] = run(engine, [prompt], SamplingParams(max_tokens=10, ignore_eos=True), router=router)
    [reference] = transformers_greedy(directory, [prompt], 10)
    stop = reference.index(2) if 2 in reference else len(reference)
    assert answer.token_ids[:stop] == reference[:stop]
