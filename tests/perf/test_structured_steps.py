# SPDX-License-Identifier: Apache-2.0
"""The rounds of the benchmark over a pretended engine: each schema is new, and only steps of all rows count."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from lightllm_backend.grammar.compiler import GrammarCompiler, ModelVocabulary
from lightllm_backend.request import FinishReason, Request, TokenChunk
from lightllm_backend.text.tokenizer import Tokenizer
from perf import structured_steps
from perf.structured_steps import SAMPLINGS, SCHEMAS, Rounds, compare

TOKENIZER = Path(__file__).parents[1] / "data" / "llama"


class PretendedEngine:
    """Runs as many requests together; each step takes a second of its clock."""

    def __init__(self, together: int) -> None:
        self.together = together
        self.now = 0.0
        self.requests: list[Request] = []
        self._waiting: list[tuple[Request, Callable[[TokenChunk], None]]] = []

    def wait_ready(self) -> SimpleNamespace:
        return SimpleNamespace(vocab_size=100)

    def new_uid(self) -> str:
        return str(len(self.requests))

    def submit(self, request: Request, on_chunk: Callable[[TokenChunk], None]) -> None:
        self.requests.append(request)
        self._waiting.append((request, on_chunk))
        if len(self._waiting) < self.together:
            return
        most = request.sampling.max_tokens
        for number in range(most):
            self.now += 1
            for one, tell in self._waiting:
                tell(TokenChunk(one.uid, [7], [], FinishReason.LENGTH if number == most - 1 else None))
        self._waiting.clear()


def rounds_of(monkeypatch: pytest.MonkeyPatch, together: int) -> tuple[Rounds, PretendedEngine]:
    engine = PretendedEngine(together)
    monkeypatch.setattr(structured_steps, "time", SimpleNamespace(perf_counter=lambda: engine.now))
    return Rounds(engine, prompt_tokens=3, output_tokens=10), engine  # type: ignore[arg-type]


def test_every_request_has_a_schema_of_its_own_that_can_be_followed(monkeypatch) -> None:
    rounds, engine = rounds_of(monkeypatch, together=8)
    assert rounds.step_seconds(SAMPLINGS["greedy"], 8, True) == 1
    tokenizer = Tokenizer.load(TOKENIZER)
    compiler = GrammarCompiler(lambda: ModelVocabulary(tokenizer, tokenizer.vocab_size, (2,)))
    asked = [request.sampling for request in engine.requests]
    assert len({sampling.structured_output for sampling in asked}) == len(SCHEMAS) == 8
    for sampling in asked:
        assert json.loads(sampling.structured_output)["json_schema"]["minItems"] == 1000
        compiler.compile(sampling)


def test_turns_are_compared_without_the_first(monkeypatch) -> None:
    rounds, engine = rounds_of(monkeypatch, together=1)
    assert compare(lambda structured: rounds.first_seconds(SAMPLINGS["drawn"], structured), 2) == {
        "without_ms": 1000, "structured_ms": 1000,
    }  # fmt: skip
    assert [bool(one.sampling.structured_output) for one in engine.requests] == [False, True] * 3
    assert all(one.sampling.max_tokens == 1 for one in engine.requests)


def test_rows_that_do_not_run_together_are_no_measurement(monkeypatch) -> None:
    rounds, _ = rounds_of(monkeypatch, together=1)
    with pytest.raises(RuntimeError, match="ran together for 0 of 10 steps"):
        rounds.step_seconds(SAMPLINGS["greedy"], 4, False)
