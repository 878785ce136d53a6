# SPDX-License-Identifier: Apache-2.0
"""Generates documents by the schemas of perf/data/json_schemas.json with the embedded model, and validates each.

    python -m tests.structured_output 1000

A document ends by itself or by max_tokens. One that has ended by itself must parse and validate; the exit code is 1 if
one does not, or if a request fails.
"""

from __future__ import annotations

import collections
import json
import sys
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path

import click
import jsonschema

from lightllm_backend.config import EngineConfig
from lightllm_backend.grammar.compiler import GrammarCompiler, ModelVocabulary
from lightllm_backend.launch.embedded_model import embedded_model_directory
from lightllm_backend.request import FinishReason, SamplingParams
from lightllm_backend.text.model_tokenizer import load_tokenizer
from lightllm_backend.text.tokenizer import Tokenizer
from lightllm_backend.worker.main import build_router
from tests.runner.engine_harness import Answer, load, run

SCHEMAS = json.loads((Path(__file__).parents[1] / "perf/data/json_schemas.json").read_text())
RUNNING, AT_ONCE = 64, 250  # requests that run together, and that are queued together
CHECKED_FORMATS = jsonschema.FormatChecker(("date", "date-time", "email", "ipv4", "uuid"))


def problem(answer: Answer, schema: object, tokenizer: Tokenizer, eos_ids: Sequence[int]) -> str | None:
    """Return what is wrong with an answer, or None."""
    if answer.reason is FinishReason.LENGTH:
        return None
    if answer.reason is not FinishReason.STOP:
        return f"{answer.reason}: {answer.error}"
    text = tokenizer.decode([token for token in answer.token_ids if token not in eos_ids], skip_special_tokens=False)
    exact = json.loads(json.dumps(schema), parse_float=Decimal)  # in floats, 1.12 is no multiple of 0.01
    try:
        validator = jsonschema.validators.validator_for(exact)(exact, format_checker=CHECKED_FORMATS)
        validator.validate(json.loads(text, parse_float=Decimal))
    except (ValueError, jsonschema.ValidationError) as error:
        return f"{str(error).splitlines()[0]} in {text!r}"
    return None


@click.command(help=__doc__)
@click.argument("count", type=click.IntRange(1))
@click.option("--max-tokens", default=300)
@click.option("--temperature", default=1.0)
def main(count: int, max_tokens: int, temperature: float) -> None:
    directory = embedded_model_directory()
    engine = load(directory, running_max_req_size=RUNNING, max_total_token_num=RUNNING * 512)
    tokenizer = load_tokenizer(directory, EngineConfig())
    compiler = GrammarCompiler(lambda: ModelVocabulary(tokenizer, engine.info.vocab_size, engine.info.eos_ids))
    names, found = list(SCHEMAS), collections.Counter[str]()
    for first in range(0, count, AT_ONCE):
        numbers = range(first, min(count, first + AT_ONCE))
        chosen = [names[number % len(names)] for number in numbers]
        prompts = [
            tokenizer.encode(
                f"<|im_start|>user\nWrite an example of {name}, as JSON.<|im_end|>\n<|im_start|>assistant\n"
            )
            for name in chosen
        ]
        sampling = [
            SamplingParams(
                max_tokens=max_tokens, do_sample=True, temperature=temperature, seed=number,
                structured_output=json.dumps({"json_schema": SCHEMAS[name]}),
            )
            for number, name in zip(numbers, chosen, strict=True)
        ]  # fmt: skip
        router = build_router(EngineConfig(running_max_req_size=RUNNING), engine.info, engine.batch_max_tokens)
        answers = run(engine, prompts, sampling, router=router, compiler=compiler)
        for name, answer in zip(chosen, answers, strict=True):
            wrong = problem(answer, SCHEMAS[name], tokenizer, engine.info.eos_ids)
            if wrong:
                print(f"{name}: {wrong}")
            found["invalid" if wrong else str(answer.reason and answer.reason.value)] += 1
        print(f"{numbers[-1] + 1} documents: {dict(found)}", flush=True)
    sys.exit(1 if found["invalid"] else 0)


if __name__ == "__main__":
    main()
