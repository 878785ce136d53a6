# SPDX-License-Identifier: Apache-2.0
"""A request never sees another's K and V: isolation.py with few requests, and proof that it would notice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lightllm_backend.request import SamplingParams
from lightllm_backend.router.router import Router
from tests.runner.engine_harness import run, save_random_llama
from tests.runner.isolation import POOL_TOKENS, compare, load_small, mixed_requests, solo_answers

NUM_REQUESTS = 20


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_llama(tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize(("kv_dtype", "overlap"), [("auto", 1), ("int8", 0)])
def test_mixed_requests_get_what_they_get_alone_with_freed_slots_poisoned(
    directory: Path, kv_dtype: str, overlap: int
) -> None:
    engine = load_small(directory, kv_dtype)
    prompts, params = mixed_requests(NUM_REQUESTS, seed=3)
    outcome = compare(engine, prompts, params, solo_answers(engine, prompts, params), overlap)
    assert outcome.differing == []
    assert outcome.preemptions > 3
    assert outcome.shared_tokens > 40
    assert outcome.freed > 5 * POOL_TOKENS


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_a_freed_slot_that_is_read_changes_the_answer(directory: Path, kv_dtype: str) -> None:
    """As if the slot that holds the third token of a running sequence had become free."""
    engine = load_small(directory, kv_dtype)
    sampling = SamplingParams(max_tokens=10, ignore_eos=True)
    [alone] = run(engine, [[5, 6, 7, 8]], sampling)
    router = Router(POOL_TOKENS, 16, 32, 1, frozenset())
    next_batch, planned = router.next_batch, []

    def poisoning_next_batch():
        batch = next_batch()
        if batch is not None:
            planned.append(batch)
            if len(planned) == 4:
                engine.storage.poison(planned[0].slots[0, 2:3])
        return batch

    router.next_batch = poisoning_next_batch
    [poisoned] = run(engine, [[5, 6, 7, 8]], sampling, router=router)
    assert poisoned.token_ids[:3] == alone.token_ids[:3]
    assert poisoned.token_ids != alone.token_ids


def test_poison_reaches_the_freed_slots_alone(directory: Path) -> None:
    for kv_dtype in ("auto", "int8"):
        storage = load_small(directory, kv_dtype).storage
        for k, v, scales in storage.layers:
            for tensor in (k, v, scales):
                if tensor is not None:
                    tensor.zero_()
        storage.poison(np.array([2, 5], dtype=np.int32))
        for k, v, scales in storage.layers:
            for tensor in (k, v) if scales is None else (scales,):
                spoilt = tensor.isnan().flatten(1)
                assert spoilt.all(1).nonzero().flatten().tolist() == [2, 5]
                assert spoilt.any(1).sum() == 2
