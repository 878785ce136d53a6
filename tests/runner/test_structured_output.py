# SPDX-License-Identifier: Apache-2.0
"""Structured output in the engine: Router and ModelRunner on a random little LLaMA, whose every text is nonsense."""

import json
import random
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
import torch

from lightllm_backend.grammar.compiler import GrammarCompiler, ModelVocabulary
from lightllm_backend.grammar.matcher import Matcher
from lightllm_backend.request import FinishReason, RequestError, SamplingParams
from lightllm_backend.router.router import Router
from lightllm_backend.runner.token_masks import mask_of
from lightllm_backend.text.tokenizer import Tokenizer
from lightllm_backend.worker.load import LoadedEngine
from tests.router.test_preemption import RecklessAdmission
from tests.runner.engine_harness import Answer, load, run, save_random_llama

ROOT = Path(__file__).parents[2]
TOKENIZER = Tokenizer.load(ROOT / "tests/data/llama")
EOS = 2
SCHEMAS = json.loads((ROOT / "perf/data/json_schemas.json").read_text())
FEW = ("person", "nested_arrays", "recursive_tree", "discriminated_union", "patterns")
PROMPTS = [random.Random(i).choices(range(3, TOKENIZER.vocab_size), k=i % 7 + 1) for i in range(10)]
WILD = SamplingParams(max_tokens=200, do_sample=True, temperature=2.0)
FREE = SamplingParams(max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> LoadedEngine:
    directory = tmp_path_factory.mktemp("llama")
    save_random_llama(directory, vocab_size=TOKENIZER.vocab_size + 5, max_position_embeddings=512)
    return load(directory, max_total_token_num=8192)


@pytest.fixture(scope="module")
def compiler(engine: LoadedEngine) -> GrammarCompiler:
    return GrammarCompiler(lambda: ModelVocabulary(TOKENIZER, engine.info.vocab_size, (EOS,)))


def asking(sampling: SamplingParams, **asked: object) -> SamplingParams:
    return replace(sampling, structured_output=json.dumps(asked))


def text_of(answer: Answer) -> str:
    ids = answer.token_ids
    return TOKENIZER.decode(ids[:-1] if ids[-1] == EOS else ids, skip_special_tokens=False)


@pytest.mark.parametrize("overlap", [0, 1])
def test_documents_that_end_are_valid(engine, compiler, overlap) -> None:
    asked = [asking(replace(WILD, seed=index), json_schema=SCHEMAS[name]) for index, name in enumerate(FEW * 2)]
    answers = run(engine, PROMPTS, asked, overlap=overlap, compiler=compiler)
    ended = [answer.reason is FinishReason.STOP for answer in answers]
    assert sum(ended) >= 6
    for name, answer, has_ended in zip(FEW * 2, answers, ended, strict=True):
        assert answer.error is None
        if has_ended:
            jsonschema.validate(json.loads(text_of(answer)), SCHEMAS[name])


def test_neighbours_do_not_change(engine, compiler) -> None:
    """The same tokens beside constrained rows as without them, and the other way round; plain, drawn, with the rest."""
    kinds = [
        FREE, asking(WILD, regex="(ab|cd){3,9}"), replace(WILD, max_tokens=12, seed=3, top_p=0.9), replace(FREE),
        asking(FREE, choice=["yes", "no", "maybe"]), replace(FREE, return_log_probs=True), replace(FREE, min_tokens=4),
        replace(FREE, repetition_penalty=1.3), asking(WILD, json_schema=SCHEMAS["person"]),
        replace(FREE, allowed_token_ids=(50, 60, 70)),
    ]  # fmt: skip
    alone = [run(engine, [prompt], one, compiler=compiler)[0] for prompt, one in zip(PROMPTS, kinds, strict=True)]
    for overlap in (0, 1):
        together = run(engine, PROMPTS, kinds, [0, 0, 1, 2, 2, 3, 3, 4, 5, 5], 9, overlap, compiler=compiler)
        assert [one.token_ids for one in together] == [one.token_ids for one in alone]
        assert [one.reason for one in together] == [one.reason for one in alone]


def test_a_preemption_changes_nothing(engine, compiler) -> None:
    schemas = [SCHEMAS["survey"], SCHEMAS["person"]] * 3
    asked = [asking(replace(WILD, max_tokens=60, seed=i), json_schema=schema) for i, schema in enumerate(schemas)]
    undisturbed = run(engine, PROMPTS[:6], asked, compiler=compiler)
    for overlap in (0, 1):
        router = Router(120, 16, 64, max_queue_size=99, eos_ids=frozenset({EOS}), policy=RecklessAdmission())
        answers = run(engine, PROMPTS[:6], asked, overlap=overlap, router=router, compiler=compiler)
        assert router.stats().preemptions_total > 0
        assert [(one.token_ids, one.reason) for one in answers] == [(one.token_ids, one.reason) for one in undisturbed]


@pytest.mark.parametrize("overlap", [0, 1])
def test_each_of_several_answers_follows_by_itself(engine, compiler, overlap) -> None:
    asked = asking(replace(WILD, seed=5, max_tokens=60), json_schema=SCHEMAS["person"])
    alone = [run(engine, PROMPTS[:1], replace(asked, seed=5 + i), compiler=compiler)[0] for i in range(3)]
    together = run(engine, PROMPTS[:1], replace(asked, n=3), overlap=overlap, compiler=compiler)
    assert [(one.token_ids, one.reason) for one in together] == [(one.token_ids, one.reason) for one in alone]
    assert len({tuple(one.token_ids) for one in together}) == 3


@pytest.mark.parametrize("overlap", [0, 1])
def test_a_complete_text_ends_by_itself(engine, compiler, overlap) -> None:
    asked = [asking(FREE, choice=["yes", "no"]), asking(FREE, regex="[ab]{4}"), asking(FREE, json_schema={"const": 5})]
    answers = run(engine, PROMPTS[:3], asked, overlap=overlap, compiler=compiler)
    assert all(answer.reason is FinishReason.STOP for answer in answers)
    assert all(EOS not in answer.token_ids for answer in answers), "no EOS is needed, and it is ignored"
    texts = [text_of(answer) for answer in answers]
    assert texts[0] in ("yes", "no")
    assert set(texts[1]) <= {"a", "b"}
    assert texts[2] == "5"


@pytest.mark.parametrize("overlap", [0, 1])
def test_a_text_that_cannot_be_completed_ends_with_an_error(engine, compiler, overlap) -> None:
    asked = [asking(FREE, grammar='start: "ab" nothing\nnothing: nothing'), FREE]
    failed, neighbour = run(engine, PROMPTS[:2], asked, overlap=overlap, compiler=compiler)
    assert failed.reason is FinishReason.FAILED
    assert str(failed.error) == "INVALID_ARG: structured_output allows nothing after this text, which is not complete"
    assert TOKENIZER.decode(failed.token_ids, skip_special_tokens=False) == "ab"
    assert neighbour == run(engine, PROMPTS[1:2], FREE)[0]


def test_min_tokens_wait_unless_only_the_end_is_left(engine, compiler) -> None:
    every_end = replace(WILD, min_tokens=8, max_tokens=20)
    asked = [asking(replace(every_end, seed=seed), regex="a*") for seed in range(4)]
    asked += [asking(every_end, regex="aa?"), asking(every_end, choice=["a"])]
    answers = run(engine, PROMPTS[:6], asked, compiler=compiler)
    assert all(len(answer.token_ids) > 8 for answer in answers[:4])
    assert all(len(answer.token_ids) <= 2 and answer.reason is FinishReason.STOP for answer in answers[4:])
    ignoring = run(engine, PROMPTS[:2], [replace(one, ignore_eos=True) for one in asked[:2]], compiler=compiler)
    assert all(answer.reason is FinishReason.LENGTH and EOS not in answer.token_ids for answer in ignoring)


def test_a_stop_id_may_end_where_the_text_may(engine, compiler) -> None:
    stop = TOKENIZER.vocab_size + 3  # no text, so never the grammar's
    asked = [
        asking(replace(WILD, stop_token_ids=(stop,), ignore_eos=True, seed=seed, max_tokens=100), regex="(ab){2}(ab)*")
        for seed in range(8)
    ]
    answers = run(engine, PROMPTS[:8], asked, compiler=compiler)
    ended = [answer for answer in answers if answer.token_ids[-1] == stop]
    assert ended
    for answer in ended:
        assert answer.reason is FinishReason.STOP
        assert len(TOKENIZER.decode(answer.token_ids[:-1])) >= 4


def test_log_probs_stay_the_models_own(engine, compiler) -> None:
    asked = asking(replace(FREE, return_log_probs=True, frequency_penalty=0.5), regex="[a-z]{5,9}")
    [answer] = run(engine, PROMPTS[:1], asked, compiler=compiler)
    forced = replace(FREE, return_log_probs=True, max_tokens=1)
    for index, token in enumerate(answer.token_ids[:3]):
        [again] = run(engine, [PROMPTS[0] + answer.token_ids[:index]], replace(forced, allowed_token_ids=(token,)))
        assert again.token_ids == [token]
        assert again.log_probs[0] == pytest.approx(answer.log_probs[index], abs=1e-4)


def test_allowed_token_ids(engine) -> None:
    allowed = tuple(range(100, 140))
    asked = [replace(FREE, allowed_token_ids=allowed), replace(WILD, max_tokens=30, allowed_token_ids=allowed), FREE]
    answers = run(engine, PROMPTS[:3], asked)
    assert set(answers[0].token_ids + answers[1].token_ids) <= set(allowed)
    assert len(set(answers[1].token_ids)) > 5
    assert answers[2].token_ids == run(engine, PROMPTS[2:3], FREE)[0].token_ids


def test_a_matcher_that_fails_ends_its_request_alone(engine, compiler) -> None:
    class Broken:
        def __init__(self) -> None:
            self.inner = compiler.compile(asking(FREE, regex="a+")).inner

        def change_ends(self, mask) -> None:
            mask[:] = torch.from_numpy(mask_of([5], len(mask))).numpy()  # a token that does not fit

        @staticmethod
        def accept_all(matchers, token_ids) -> list[bool | RequestError]:
            return Matcher.accept_all([compiler.compile(asking(FREE, regex="a+")) for _ in matchers], token_ids)

    class Compiler:
        def compile(self, _: SamplingParams) -> Broken:
            return Broken()

    free, broken = run(engine, PROMPTS[:2], [FREE, asking(FREE, regex="a+")], compiler=Compiler())  # type: ignore[arg-type]
    assert broken.reason is FinishReason.FAILED
    assert "token 5 does not follow structured_output" in str(broken.error)
    assert free.token_ids == run(engine, PROMPTS[:1], FREE)[0].token_ids
