# SPDX-License-Identifier: Apache-2.0
"""Router and ModelRunner together against transformers, on a random little LLaMA in float32."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lightllm_backend.config import EngineConfig
from lightllm_backend.request import TOP_LOG_PROB, FinishReason, SamplingParams
from lightllm_backend.router.router import Router
from lightllm_backend.runner.sampler import likeliest
from lightllm_backend.worker.load import LoadedEngine
from lightllm_backend.worker.main import build_router
from tests.router.test_preemption import RecklessAdmission
from tests.runner.engine_harness import load, run, save_random_llama, transformers_greedy, transformers_logits

MAX_TOKENS = 12
PROMPTS = [
    random.Random(seed).choices(range(3, 199), k=length)
    for seed, length in enumerate([1, 2, 3, 5, 8, 13, 21, 34, 55, 60, 1, 7])
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def engine(directory: Path) -> LoadedEngine:
    return load(directory)


@pytest.fixture(scope="module")
def expected(directory: Path) -> list[list[int]]:
    return transformers_greedy(directory, PROMPTS, MAX_TOKENS)


@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize("batch_max_tokens", [4096, 7])
def test_greedy_tokens_are_those_of_transformers(engine, expected, batch_max_tokens, overlap) -> None:
    arrivals = [random.Random(overlap).randrange(10) for _ in PROMPTS]
    answers = run(engine, PROMPTS, SamplingParams(max_tokens=MAX_TOKENS), arrivals, batch_max_tokens, overlap)
    assert [answer.token_ids for answer in answers] == expected
    for answer in answers:
        stopped = answer.token_ids[-1] == 2
        assert answer.reason is (FinishReason.STOP if stopped else FinishReason.LENGTH)


def test_a_pool_that_is_too_small_for_all_gives_the_same_tokens(directory, expected) -> None:
    small = load(directory, max_total_token_num=80)
    answers = run(small, PROMPTS, SamplingParams(max_tokens=MAX_TOKENS))
    assert [answer.token_ids for answer in answers] == expected


def test_a_preemption_changes_nothing(engine) -> None:
    everything = SamplingParams(
        max_tokens=30, do_sample=True, temperature=1.5, top_p=0.95, top_k=50, min_p=0.01, presence_penalty=0.5,
        frequency_penalty=0.3, repetition_penalty=1.2, min_tokens=9, return_log_probs=True,
        logit_bias=((7, 2.0), (50, -100.0)), top_logprobs=2,
    )  # fmt: skip
    sampling = [replace(everything, seed=index, min_tokens=index) for index in range(len(PROMPTS))]
    sampling[::3] = [SamplingParams(max_tokens=30)] * 4
    undisturbed = run(engine, PROMPTS, sampling)
    for tokens, overlap in ((64, 0), (7, 1)):
        router = Router(120, 16, tokens, max_queue_size=99, eos_ids=frozenset({2}), policy=RecklessAdmission())
        answers = run(engine, PROMPTS, sampling, overlap=overlap, router=router)
        assert router.stats().preemptions_total > 5
        for answer, expected in zip(answers, undisturbed, strict=True):
            assert (answer.token_ids, answer.reason) == (expected.token_ids, expected.reason)
            assert answer.log_probs == pytest.approx(expected.log_probs, abs=1e-4)
            assert len(answer.top_log_probs) == len(expected.top_log_probs)


def test_log_probs_are_the_models_own(engine, directory) -> None:
    sampling = SamplingParams(
        max_tokens=6,
        do_sample=True,
        temperature=0.5,
        seed=3,
        presence_penalty=1.0,
        return_log_probs=True,
        ignore_eos=True,
    )
    silent = replace(sampling, return_log_probs=False)
    answers = run(engine, PROMPTS[:4], [sampling, silent, sampling, silent])
    for prompt, answer in zip(PROMPTS[:4:2], answers[::2], strict=True):
        truth = transformers_logits(directory, prompt, answer.token_ids).log_softmax(-1)
        chosen = truth.gather(1, torch.tensor(answer.token_ids).unsqueeze(1)).squeeze(1)
        assert torch.allclose(torch.tensor(answer.log_probs), chosen, atol=1e-4)
    assert answers[1].log_probs == answers[3].log_probs == []


def test_the_likeliest_tokens_are_the_models_own(engine, directory) -> None:
    """Beside requests that ask for none, or for others, and whatever changes the choice."""
    plain = SamplingParams(max_tokens=6, ignore_eos=True, return_log_probs=True)
    drawn = replace(plain, do_sample=True, temperature=2.0, seed=5, logit_bias=((9, 50.0),), top_logprobs=20)
    sampling = [replace(plain, top_logprobs=3), replace(plain, return_log_probs=False), drawn, plain]
    answers = run(engine, PROMPTS[:4], sampling, arrivals=[0, 0, 2, 3])
    assert answers[1].top_log_probs == answers[3].top_log_probs == b""
    for index, count in ((0, 3), (2, 20)):
        pairs = np.frombuffer(answers[index].top_log_probs, TOP_LOG_PROB).reshape(6, count)
        truth = transformers_logits(directory, PROMPTS[index], answers[index].token_ids).log_softmax(-1).topk(count)
        assert pairs["token_id"].tolist() == truth.indices.tolist()
        assert pairs["log_prob"] == pytest.approx(truth.values.numpy(), abs=1e-4)
    assert np.frombuffer(answers[0].top_log_probs, TOP_LOG_PROB)["log_prob"][::3].tolist() == answers[0].log_probs


def test_of_equally_likely_tokens_the_chosen_one_comes_first() -> None:
    logits = torch.full((3, 500), 1.0)
    logits[1, 400:403], logits[2, 7] = 2.0, 3.0
    values, ids = likeliest(logits, 3)
    assert values[:, 0].tolist() == [1.0, 2.0, 3.0]
    assert ids[1].tolist() == [400, 401, 402]
    assert (ids.diff() > 0)[:2].all()
    assert ids[2, 0] == 7


def test_a_seeded_request_does_not_depend_on_its_neighbours(engine) -> None:
    sampling = SamplingParams(max_tokens=10, do_sample=True, temperature=1.5, top_p=0.95, top_k=50, seed=2**64 - 5)
    alone = run(engine, PROMPTS[5:6], sampling)[0]
    crowd = [replace(sampling, seed=index) for index in range(len(PROMPTS))]
    crowd[5] = sampling
    among = run(engine, PROMPTS, crowd, arrivals=[index % 3 for index in range(len(PROMPTS))], batch_max_tokens=9)
    assert among[5].token_ids == alone.token_ids
    assert run(engine, PROMPTS[5:6], replace(sampling, seed=1))[0].token_ids != alone.token_ids


def test_draws_follow_the_distribution(engine, directory) -> None:
    prompt, count = PROMPTS[3], 400
    sampling = [SamplingParams(max_tokens=1, do_sample=True, temperature=2.0, seed=seed) for seed in range(count)]
    drawn = torch.tensor([answer.token_ids[0] for answer in run(engine, [prompt] * count, sampling)])
    probabilities = (transformers_logits(directory, prompt, [0])[0] / 2.0).softmax(-1)
    top = int(probabilities.argmax())
    deviation = (probabilities[top] * (1 - probabilities[top]) / count).sqrt()
    assert abs((drawn == top).float().mean() - probabilities[top]) < 4 * deviation
    assert len(set(drawn.tolist())) > 5


def test_min_tokens_waits_with_eos(directory) -> None:
    every_token_ends = load(directory, eos_id=tuple(range(0, 199, 2)))
    sampling = SamplingParams(max_tokens=12, min_tokens=5)
    for answer in run(every_token_ends, PROMPTS, sampling):
        assert all(token % 2 == 1 for token in answer.token_ids[:5])
        assert len(answer.token_ids) > 5
        assert answer.reason is FinishReason.LENGTH or answer.token_ids[-1] % 2 == 0
    ignoring = run(every_token_ends, PROMPTS[:3], replace(sampling, ignore_eos=True))
    assert all(len(answer.token_ids) == 12 and answer.reason is FinishReason.LENGTH for answer in ignoring)


def test_stop_token_ids_end_and_wait_for_min_tokens(engine) -> None:
    free = [answer.token_ids for answer in run(engine, PROMPTS, SamplingParams(max_tokens=12, ignore_eos=True))]
    stops = [SamplingParams(max_tokens=12, ignore_eos=True, stop_token_ids=(tokens[3], 198)) for tokens in free]
    for answer, tokens in zip(run(engine, PROMPTS, stops), free, strict=True):
        first = min(index for index, token in enumerate(tokens) if token in (tokens[3], 198))
        assert (answer.token_ids, answer.reason) == (tokens[: first + 1], FinishReason.STOP)
    waiting = [replace(sampling, min_tokens=5) for sampling in stops]
    for answer, sampling in zip(run(engine, PROMPTS, waiting), waiting, strict=True):
        assert not set(answer.token_ids[:5]) & set(sampling.stop_token_ids)
        assert len(answer.token_ids) > 5


def test_penalties_change_the_logits_as_defined(engine, directory) -> None:
    prompt = PROMPTS[6]
    sampling = SamplingParams(
        max_tokens=10, presence_penalty=0.7, frequency_penalty=0.9, repetition_penalty=1.3, ignore_eos=True
    )
    tokens = run(engine, [prompt], sampling)[0].token_ids
    assert tokens != run(engine, [prompt], SamplingParams(max_tokens=10, ignore_eos=True))[0].token_ids
    all_logits = transformers_logits(directory, prompt, tokens)
    for index, (token, logits) in enumerate(zip(tokens, all_logits, strict=True)):
        seen = torch.tensor(sorted({*prompt, *tokens[:index]}))
        logits[seen] = torch.where(logits[seen] > 0, logits[seen] / 1.3, logits[seen] * 1.3)
        for generated in set(tokens[:index]):
            logits[generated] -= tokens[:index].count(generated) * 0.9 + 0.7
        assert int(logits.argmax()) == token


SHARED = [random.Random(99).randrange(3, 199) for _ in range(70)]
ALIKE = [SHARED[:length] + PROMPTS[index] for index, length in enumerate([40, 70, 55, 40, 70, 70])]


@pytest.mark.parametrize(("kv_dtype", "overlap"), [("auto", 1), ("int8", 0)])
def test_prompts_that_begin_alike_get_the_same_tokens_as_alone(directory, kv_dtype, overlap) -> None:
    """At once, so that they share within a step, and one after the other; where prompts are cut as well."""
    engine = load(directory, kv_dtype=kv_dtype)
    sampling = [SamplingParams(max_tokens=9), SamplingParams(max_tokens=9, do_sample=True, temperature=1.5, seed=4)] * 3
    alone = [run(engine, [prompt], params)[0] for prompt, params in zip(ALIKE, sampling, strict=True)]
    for batch_max_tokens, arrivals in [(4096, [0] * 6), (4096, [0, 2, 2, 15, 16, 40]), (16, [0, 0, 3, 3, 9, 9])]:
        router = Router(2048, 16, batch_max_tokens, max_queue_size=99, eos_ids=frozenset({2}))
        answers = run(engine, ALIKE, sampling, arrivals, overlap=overlap, router=router)
        assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in alone]
        # The shared beginning of 70 tokens, and what each has of its own.
        assert router.stats().prompt_tokens_total <= 70 + sum(map(len, PROMPTS[:6])) + len(ALIKE)


def test_with_dynamic_rope_beginnings_are_not_alike(engine, tmp_path) -> None:
    assert engine.prefixes_are_alike
    dynamic = save_random_llama(tmp_path, rope_scaling={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    assert not load(dynamic).prefixes_are_alike


def test_the_setting_turns_the_prefix_cache_off(engine) -> None:
    for config, alike, kept in [
        ({}, True, 12),
        ({"prefix_cache": False}, True, 0),
        ({}, False, 0),
        ({"prefix_cache": "tenant"}, True, 12),
    ]:
        router = build_router(EngineConfig(running_max_req_size=16, **config), engine.info, 4096, alike)
        run(engine, [[5] * 10], SamplingParams(max_tokens=3, ignore_eos=True), router=router)
        assert router.stats().kv_tokens_cached == kept


def test_logit_biases_are_those_of_transformers(engine, directory) -> None:
    """Greedy, beside the repetition penalty that comes after; and a row's next owner has none of them."""
    processors = pytest.importorskip("transformers.generation.logits_process")
    free = SamplingParams(max_tokens=8, ignore_eos=True)
    unbiased = run(engine, PROMPTS[:4], free)
    biases = [{answer.token_ids[0]: -100.0, 50 + index: 9.0, 3: -0.5} for index, answer in enumerate(unbiased)]
    params = [replace(free, logit_bias=tuple(one.items()), repetition_penalty=1.3) for one in biases]
    answers = run(engine, PROMPTS[:4], [*params[:3], free], arrivals=[0, 1, 2, 2])
    assert answers[3].token_ids == unbiased[3].token_ids
    for prompt, answer, biased in zip(PROMPTS[:3], answers, biases, strict=False):
        bias = processors.SequenceBiasLogitsProcessor({(token,): value for token, value in biased.items()})
        penalty = processors.RepetitionPenaltyLogitsProcessor(1.3)
        for index, logits in enumerate(transformers_logits(directory, prompt, answer.token_ids)):
            ids = torch.tensor([[*prompt, *answer.token_ids[:index]]])
            assert int(penalty(ids, bias(ids, logits[None])).argmax()) == answer.token_ids[index]
    assert [answer.token_ids for answer in run(engine, PROMPTS[:4], free)] == [one.token_ids for one in unbiased]
