# SPDX-License-Identifier: Apache-2.0
"""Simulated replicas serve every request once, one of them is the Router alone, and hashing finds what is cached."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from click.testing import CliRunner

from lightllm_backend.router.batch import Batch
from lightllm_backend.router.router import Router
from perf import capacity
from perf.capacity_page import FOLDER, PAGE, data, updated
from perf.chat_traffic import MAX_TOKENS, Chats, Turn, chat_traffic, conversations
from perf.lengths import Lengths
from perf.replica_choice import LOAD_FACTOR, POLICIES, ReplicaChoice
from perf.simulated_engine import EOS_ID, MakeRouter, simulate_alone
from perf.simulated_replicas import Served, SimulatedReplicas
from perf.step_times import StepTimes

ROWS = 64


def make_router(capacity: int = 60_000) -> MakeRouter:
    return lambda clock: Router(capacity, ROWS, 8192, 1000, frozenset({EOS_ID}), clock=clock)


def slow_steps(batch: Batch, kv_tokens: int) -> float:
    """Few steps a second, so that a test takes little time."""
    return 0.03 + 2e-5 * int(batch.lengths.sum()) + 1e-7 * kv_tokens


def served(policy: str, chats: Chats, num_replicas: int = 3) -> tuple[SimulatedReplicas, list[Served]]:
    choice = ReplicaChoice(policy, num_replicas)
    replicas = SimulatedReplicas(make_router(), ROWS, num_replicas, choice, slow_steps)
    replicas.fill(chats.before)
    return replicas, replicas.run(chats.turns)


def short_chats() -> Chats:
    """Chats of three turns, half of which begin in the middle, with answers so short that a test takes few steps."""
    rng = np.random.default_rng(0)
    chats = Chats([], [])
    for number, begin in enumerate(np.sort(rng.uniform(0, 5, 60)).tolist()):
        turns, context = [], 0
        for place in range(3):
            question, answer = rng.integers(5, 200), rng.integers(2, 30)
            turns.append(Turn(begin + 0.5 * place, number, int(context + question), int(answer)))
            context = sum(turns[-1][2:])
        chats.before.extend(turns[: number % 2])
        chats.turns.append(turns[number % 2 :])
    return chats


def test_every_request_is_served_once_and_no_question_comes_before_the_answer_to_the_last() -> None:
    chats = short_chats()
    replicas, requests = served("both", chats)
    assert sorted((one.chat, one.place) for one in requests) == [
        (chat, place) for chat, turns in enumerate(chats.turns) for place in range(len(turns))
    ]
    by_chat: dict[int, list[Served]] = {}
    for one in requests:
        assert one.turn.at <= one.arrival < one.first_token <= one.end
        by_chat.setdefault(one.chat, []).append(one)
    for turns in by_chat.values():
        assert all(one.end <= other.arrival for one, other in pairwise(turns))
    assert any(one.arrival > one.turn.at for one in requests), "an answer was late"
    made = sum(engine.router.stats().generated_tokens_total for engine in replicas.engines)
    assert made == sum(one.turn.output for one in requests) + len(chats.before)
    for engine in replicas.engines:
        engine.router.check_integrity()
        assert not engine.router.has_work


def test_one_replica_is_the_router_alone() -> None:
    rng = np.random.default_rng(0)
    lengths = [Lengths(int(prompt), int(output)) for prompt, output in rng.integers(20, 60, (60, 2))]
    arrivals = np.cumsum(rng.exponential(0.02, len(lengths))).tolist()
    router = make_router(20_000)
    alone = simulate_alone(router, ROWS, lengths, arrivals, MAX_TOKENS, step_seconds=slow_steps, plan_late=True)
    traffic = [[Turn(at, number, *one)] for number, (at, one) in enumerate(zip(arrivals, lengths, strict=True))]
    requests = SimulatedReplicas(router, ROWS, 1, ReplicaChoice("random", 1), slow_steps).run(traffic)
    assert [one.first_token - one.arrival for one in requests] == alone.first_token_seconds.tolist()
    assert [one.end - one.arrival for one in requests] == alone.end_seconds.tolist()
    assert max(alone.first_token_seconds) > 1, "there is a queue"


def test_a_hash_of_the_prefix_finds_more_in_the_caches_than_chance_and_a_run_can_be_repeated() -> None:
    chats = short_chats()
    shares = {}
    for policy in POLICIES:
        _, requests = served(policy, chats)
        shares[policy] = sum(one.cached_tokens for one in requests) / sum(one.turn.prompt for one in requests)
    assert shares["prefix hash"] > 1.5 * shares["random"] > 0
    assert shares["both"] > 1.2 * max(shares["random"], shares["least loaded"])
    assert served(POLICIES[-1], chats)[1] == requests


def test_traffic_has_the_rate_that_is_asked_for_and_prompts_that_grow() -> None:
    chats = chat_traffic(20.0, 50.0, seed=3, pause=1.0)
    assert chat_traffic(20.0, 50.0, seed=3, pause=1.0) == chats
    times = [turn.at for turns in chats.turns for turn in turns]
    assert 0 <= min(times) < 1
    assert 49 < max(times) < 50
    assert len(times) == pytest.approx(1000, rel=0.15)
    assert sum(at < 25 for at in times) == pytest.approx(500, rel=0.2), "it begins in the middle"
    longest = max(chats.turns, key=len)
    assert all(other.prompt > one.prompt + one.output for one, other in pairwise(longest))
    known = conversations()
    assert all(turn.prompt <= 2048 and sum(turn) <= 3072 for turns in known for turn in turns)


def test_a_ring_keeps_most_keys_when_a_replica_joins_and_bounds_loads() -> None:
    keys = [str(number) for number in range(2000)]
    four, five = (ReplicaChoice("prefix hash", count) for count in (4, 5))
    moved = [(four(key, [0] * 4), five(key, [0] * 5)) for key in keys]
    assert all(before == after or after == 4 for before, after in moved)
    assert sum(after == 4 for _, after in moved) / len(keys) == pytest.approx(0.2, abs=0.06)
    bounded, loads = ReplicaChoice("both", 4), [0] * 4
    for _ in range(100):
        loads[bounded("the same key", loads)] += 1
    assert max(loads) <= LOAD_FACTOR * 100 / 4 + 1


def test_measured_steps_take_what_was_measured() -> None:
    steps = StepTimes.stored("llama-7b_nvidia_h200")

    def seconds(decodes: int, kv_tokens: float, prompt: int = 0) -> float:
        lengths = np.array([1] * decodes + [prompt] * bool(prompt))
        empty = np.empty(0, dtype=np.int32)
        return steps(Batch(empty, empty, lengths, empty, empty, decodes, ()), int(kv_tokens))

    for row in steps.result["rows"]:
        if "step_ms" in row:
            assert seconds(row["batch"], row["batch"] * row["mean_context"]) == pytest.approx(
                row["step_ms"] / 1e3, rel=0.02
            ), row
    assert seconds(0, 0, 1024) == pytest.approx(0.0237, rel=0.01)
    assert seconds(32, 6144, 1024) == pytest.approx(0.0044 + 0.0237 - steps.base[0], rel=0.02)
    assert steps.most_running == 580
    shared = StepTimes.stored("llama-7b_weights_fp8_nvidia_h200", kv_from="llama-7b_nvidia_h200")
    assert shared.kv_token_seconds == pytest.approx(steps.kv_token_seconds)
    assert shared.base[0] < steps.base[0]
    grouped = StepTimes.stored("llama-2-70b_tp2_nvidia_h200", kv_from="llama-7b_nvidia_h200")
    # 80 layers with 4 heads of K and V on each GPU, 32 layers with 32 heads; all of the same size.
    assert grouped.kv_token_seconds == pytest.approx(steps.kv_token_seconds * (80 * 4) / (32 * 32), rel=1e-3)


def test_a_million_tokens_costs_what_can_be_counted_by_hand() -> None:
    row = {"replicas": 2, "output_tokens_per_second": 1000.0, "prompt_tokens_per_second": 3000.0}
    assert capacity.cost(row, gpus=2, price=0.9) == pytest.approx({"per_million_output": 1.0, "per_million": 0.25})
    rows = [
        {"replicas": 8, "policy": "both", "first_token_p99": first, "output_tokens_per_second": tokens}
        | {"arrivals_per_second": 10.0, "requests_per_second": ended}
        for first, tokens, ended in (
            (0.1, 10.0, 10.0), (0.3, 20.0, 9.6), (0.3, 30.0, 9.4), (0.9, 40.0, 10.0), (None, 50.0, 10.0),
        )
    ]  # fmt: skip
    assert capacity.best(rows, 0.5) == [rows[1]]
    shown = CliRunner().invoke(capacity.main, ["--price", "1"])
    assert shown.exit_code == 0
    assert "at 1 dollars a GPU and hour" in shown.output
    refused = CliRunner().invoke(capacity.main, ["--first_token", "0"])
    assert refused.exit_code == 2
    assert "--first_token is 0" in refused.output
    wrong = CliRunner().invoke(capacity.main, ["--replicas", "2,x"])
    assert "'2,x'; allowed: whole numbers > 0, separated by commas" in wrong.output


def test_the_stored_simulations_are_of_the_stored_steps() -> None:
    for result in capacity.stored_capacities():
        steps = capacity.MODELS[result["model"]].steps
        assert result["most_running"] == steps.most_running
        assert result["pool_tokens"] == steps.pool_tokens


def test_the_page_shows_the_stored_simulations() -> None:
    results = capacity.stored_capacities()
    text = PAGE.read_text(encoding="utf-8")
    assert updated(text, results) == text, "run python -m perf.capacity_page"
    assert (FOLDER / "data.js").read_text(encoding="utf-8") == data(results), "run python -m perf.capacity_page"
    assert "<!-- table: rates of llama-7b -->" in text
    small, large = (capacity.Case(model, 8, 1.0, "both").warm_up for model in ("llama-7b", "llama-2-70b tp2"))
    assert f"take, {small:.0f} s for LLaMA-7B and {large:.0f} s for LLaMA-2-70B on two GPUs" in text
