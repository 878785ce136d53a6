# SPDX-License-Identifier: Apache-2.0
"""Sequences that outgrow `recompute_at`: from there on, all their tokens turn as those of long sequences do."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from tests.router.fake_engine import EngineLoop, FakeRunner, expected_answer, make_request
from tests.router.test_router import make_router

LIMIT = 10

both_depths = pytest.mark.parametrize("depth", [0, 1])


def make_loop(depth: int, capacity: int = 100, **settings) -> EngineLoop:
    router = make_router(capacity, recompute_at=LIMIT, **settings)
    return EngineLoop(router, FakeRunner(capacity, 8, LIMIT), depth)


def admissions(loop: EngineLoop) -> Iterable[tuple[int, int, int, bool]]:
    """The prompt, generated and cached tokens of each admission, and whether it is recomputed."""
    return [
        (len(one.prompt_ids), len(one.generated_ids), len(one.cached_slots), one.is_recomputed)
        for batch in loop.batches
        for one in batch.admitted
    ]


@both_depths
@pytest.mark.parametrize("prefix_cache", [False, True])
@pytest.mark.parametrize(
    ("prompt", "max_tokens", "expected"),
    [
        (6, 5, [(6, 0, 0, False)]),  # the last token is never fed back
        (6, 6, [(6, 0, 0, False), (6, 5, 0, True)]),
        (6, 9, [(6, 0, 0, False), (6, 5, 0, True)]),
        (10, 4, [(10, 0, 0, False), (10, 1, 0, True)]),
        (11, 4, [(11, 0, 0, False)]),
    ],
)
def test_it_prefills_once_more(depth, prefix_cache, prompt, max_tokens, expected) -> None:
    loop = make_loop(depth, prefix_cache=prefix_cache)
    request = make_request("a", prompt, max_tokens=max_tokens)
    loop.submit(request)
    loop.run()
    assert admissions(loop) == expected
    assert loop.answer("a") == expected_answer(request, frozenset())
    assert loop.router.stats().preemptions_total == 0


@both_depths
def test_a_prompt_finds_the_prefixes_of_its_kind_alone(depth) -> None:
    """A prompt of at most the limit those of such, and a longer one those of longer sequences."""
    loop = make_loop(depth)
    for name, length, cached in [("a", 8, 0), ("b", 9, 8), ("c", 14, 0), ("d", 20, 14), ("e", 10, 9)]:
        loop.submit(make_request(name, length, max_tokens=1, family=3))
        loop.run()
        assert next(reversed(admissions(loop))) == (length, 0, cached, False), name


@both_depths
def test_several_answers_outgrow_the_limit_together(depth) -> None:
    """With the cache off they share the prompt, and its recomputed K and V."""
    loop = make_loop(depth, prefix_cache=False)
    loop.submit(make_request("a", 8, max_tokens=6, n=2))
    loop.run()
    assert sorted(admissions(loop)) == [(8, 0, 0, False), (8, 0, 7, False), (8, 3, 0, True), (8, 3, 10, True)]
    assert loop.router.stats().kv_tokens_used == 0


@both_depths
def test_many_outgrow_it_in_a_pool_that_holds_few(depth) -> None:
    loop = make_loop(depth, capacity=40)
    requests = [make_request(str(i), 3 + i, max_tokens=16 - i) for i in range(6)]
    for request in requests:
        loop.submit(request)
    loop.run()
    for request in requests:
        assert loop.answer(request.uid) == expected_answer(request, frozenset())
    assert sum(recomputed for *_, recomputed in admissions(loop)) == 6
