# SPDX-License-Identifier: Apache-2.0
"""A model whose logits are not numbers for some prompts: those requests fail, and the ones beside them do not.

One token's embedding is NaN, so whatever follows this token is NaN too. Loading refuses such weights, but here they
stand for activations that overflow.
"""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightllm_backend.models.finite_weights import FiniteWeights
from lightllm_backend.request import FinishReason, SamplingParams
from lightllm_backend.router.router import NOT_NUMBERS
from lightllm_backend.worker.load import LoadedEngine
from tests.runner.engine_harness import Answer, load, run, save_random_llama

PROMPTS = [
    [3 + index, *random.Random(index).choices(range(3, 190), k=length)]  # without a common prefix
    for index, length in enumerate([1, 3, 8, 21, 34, 60, 2, 13])
]
SPOILED = (0, 3, 5, 6)  # the prompts that get the token of the spoiled embedding
GREEDY = SamplingParams(max_tokens=8, ignore_eos=True)
DRAWN = replace(GREEDY, do_sample=True, temperature=0.8, top_k=40, seed=3)
WITH_LOG_PROBS = replace(GREEDY, return_log_probs=True, top_logprobs=3)
KINDS = {
    "greedy": GREEDY,
    "drawn": DRAWN,
    "penalised": replace(GREEDY, repetition_penalty=1.2),
    "with log probabilities": WITH_LOG_PROBS,
    "drawn with log probabilities": replace(DRAWN, return_log_probs=True),
    "masked": replace(GREEDY, allowed_token_ids=tuple(range(3, 190))),
    "drawn and masked": replace(DRAWN, allowed_token_ids=tuple(range(3, 190))),
    "with the prompt's log probabilities": replace(GREEDY, prompt_logprobs=2),
    "for the prompt's log probabilities alone": replace(GREEDY, max_tokens=0, prompt_logprobs=2),
    "for nothing": replace(GREEDY, max_tokens=0),
    "of two answers": replace(DRAWN, n=2),
}


@pytest.fixture(scope="module", autouse=True)
def _any_weights() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FiniteWeights, "check", lambda weights: None)
        yield


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_llama(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def whole(directory: Path) -> LoadedEngine:
    return load(directory)


def spoil_embedding(
    directory: Path, out: Path, token_id: int, value: float = torch.nan, name: str = "model.embed_tokens.weight"
) -> Path:
    """Copy a model into `out`, with this value in the embedding of the token, or in its row of the head."""
    weights = load_file(directory / "model.safetensors")
    weights[name][token_id, 5] = value
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text((directory / "config.json").read_text())
    return out


@pytest.fixture(scope="module", params=[torch.nan, torch.inf])
def spoiled(request, directory: Path, tmp_path_factory: pytest.TempPathFactory) -> LoadedEngine:
    return load(spoil_embedding(directory, tmp_path_factory.mktemp("spoiled"), 198, request.param))


def assert_failed(answer: Answer) -> None:
    assert answer.reason is FinishReason.FAILED
    assert answer.error is NOT_NUMBERS
    assert str(answer.error).startswith("INTERNAL: the model's logits are not numbers")


@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_only_the_requests_without_logits_fail(whole, spoiled, kind, overlap) -> None:
    """Prompts are cut into chunks, and arrive at various steps."""
    sampling = replace(KINDS[kind], logit_bias=((198, -100.0),))
    prompts = [[*prompt[:-1], 198, prompt[-1]] if i in SPOILED else prompt for i, prompt in enumerate(PROMPTS)]
    arrivals = [i % 3 for i in range(len(prompts))]
    expected = run(whole, PROMPTS, sampling, arrivals, 24, overlap)
    answers = run(spoiled, prompts, sampling, arrivals, 24, overlap)
    for index, (answer, its) in enumerate(zip(answers, expected, strict=True)):
        if index // sampling.n in SPOILED:
            assert_failed(answer)
            assert (answer.token_ids, answer.log_probs, answer.top_log_probs) == ([], [], b"")
        else:
            assert (answer.token_ids, answer.reason) == (its.token_ids, FinishReason.LENGTH)
            assert answer.log_probs == pytest.approx(its.log_probs, abs=1e-4)
            assert len(answer.top_log_probs) == len(its.top_log_probs)


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj"])
def test_a_projection_that_is_none_fails_prompts_of_any_length(directory, tmp_path, name) -> None:
    weights = load_file(directory / "model.safetensors")
    weights[f"model.layers.0.self_attn.{name}.weight"].fill_(torch.nan)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    for answer in run(load(tmp_path), PROMPTS, GREEDY):
        assert_failed(answer)


@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize("kind", ["greedy", "drawn", "with log probabilities", "masked"])
def test_the_tokens_before_the_failure_are_kept(whole, directory, tmp_path, kind, overlap) -> None:
    sampling = KINDS[kind]
    expected = run(whole, PROMPTS, sampling)
    spoiled_token = expected[2].token_ids[3]
    spoiled = load(spoil_embedding(directory, tmp_path, spoiled_token))
    answers = run(spoiled, PROMPTS, sampling, overlap=overlap)
    assert answers[2].reason is FinishReason.FAILED
    for prompt, answer, its in zip(PROMPTS, answers, expected, strict=True):
        known = [*prompt, *its.token_ids[:-1]]
        if spoiled_token in known:
            assert_failed(answer)
            kept = max(0, known.index(spoiled_token) + 1 - len(prompt))
            assert answer.token_ids == its.token_ids[:kept]
        else:
            assert (answer.token_ids, answer.reason) == (its.token_ids, FinishReason.LENGTH)
    assert {answer.reason for answer in answers} == {FinishReason.FAILED, FinishReason.LENGTH}


@pytest.mark.parametrize("overlap", [0, 1])
def test_the_prefix_cache_forgets_what_a_failed_request_has_left(whole, spoiled, overlap) -> None:
    """K and V of the tokens before the spoiled one are spoiled too, where one step has computed them."""
    prefix = list(range(10, 40))
    prompts = [[*prefix, 198, 5], [*prefix, 6], [*prefix, 7]]
    arrivals = [0, 3, 6]
    answers = run(spoiled, prompts, GREEDY, arrivals, overlap=overlap)
    assert_failed(answers[0])
    expected = run(whole, prompts, GREEDY, arrivals, overlap=overlap)
    assert [answer.token_ids for answer in answers[1:]] == [answer.token_ids for answer in expected[1:]]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_log_probabilities_that_are_not_numbers_fail_a_request_whose_tokens_are(
    whole, directory, tmp_path, value
) -> None:
    """The mask rules out the token whose logit spoils the sum over all."""
    spoiled = load(spoil_embedding(directory, tmp_path, 198, value, "lm_head.weight"))
    masked = KINDS["masked"]
    answers, expected = run(spoiled, PROMPTS, masked), run(whole, PROMPTS, masked)
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in expected]
    answers = run(spoiled, PROMPTS, replace(masked, return_log_probs=True))
    if value != value:
        for answer in answers:
            assert_failed(answer)
    # An infinite weight may make the logit minus infinity, which the sum leaves out.
    assert FinishReason.FAILED in {answer.reason for answer in answers}
