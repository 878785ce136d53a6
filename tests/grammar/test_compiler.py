# SPDX-License-Identifier: Apache-2.0
"""GrammarCompiler: what is compiled is followed, what cannot be is refused with the place and the reason."""

import json
import random
import re
import threading
from pathlib import Path

import numpy as np
import pytest

from lightllm_backend.grammar import compiler as module
from lightllm_backend.grammar.compiler import MAX_GBNF_BYTES, STACK_BYTES, GrammarCompiler, ModelVocabulary
from lightllm_backend.grammar.matcher import MaskMaker, Matcher
from lightllm_backend.grammar.schema_place import place_of_error
from lightllm_backend.request import RequestError, SamplingParams
from lightllm_backend.text.tokenizer import Tokenizer

DATA = Path(__file__).parents[1] / "data"
EOS = 2
# Where the tokens come from: tokenizer.json, which llguidance reads itself, and sentencepiece through our own.
TOKENIZERS = {mode: Tokenizer.load(DATA / "llama", mode) for mode in ("auto", "slow")}


@pytest.fixture(params=TOKENIZERS)
def mode(request: pytest.FixtureRequest) -> str:
    return request.param


def compiler_of(mode: str = "auto") -> GrammarCompiler:
    tokenizer = TOKENIZERS[mode]
    return GrammarCompiler(lambda: ModelVocabulary(tokenizer, tokenizer.vocab_size + 5, (EOS,)))


def params(**asked: object) -> SamplingParams:
    return SamplingParams(structured_output=json.dumps(asked))


def allowed(matcher: Matcher, vocab_size: int) -> list[int]:
    masks = np.zeros((1, -(-vocab_size // 32)), dtype=np.int32)
    MaskMaker().fill([matcher], masks)
    return np.unpackbits(masks.view(np.uint8), bitorder="little").nonzero()[0].tolist()


def follows(matcher: Matcher, mode: str, text: str) -> bool:
    """Whether the text, token by token, is what the masks allow, and complete."""
    tokenizer = TOKENIZERS[mode]
    rest = text.encode()
    spellings = tokenizer.spellings()
    while rest:
        fitting = [
            i for i in allowed(matcher, tokenizer.vocab_size + 5) if spellings[i] and rest.startswith(spellings[i])
        ]
        if not fitting:
            return False
        token = max(fitting, key=lambda token: len(spellings[token]))
        rest = rest[len(spellings[token]) :]
        [complete] = Matcher.accept_all([matcher], [token])
    return complete or EOS in allowed(matcher, tokenizer.vocab_size + 5)


@pytest.mark.parametrize(
    ("asked", "yes", "no"),
    [
        ({"json_schema": {"const": {"a": [1, "é "]}}}, '{"a": [1, "é "]}', '{"a": [2]}'),
        ({"json_schema": {"format": "date-time"}}, '"2026-11-29T16:09:59Z"', '"2026-11-29T16:09:60Z"'),
        ({"json_schema": {"const": {"format": "time"}}}, '{"format": "time"}', '{"format": "time", "allOf": []}'),
        ({"json_object": True}, '{\n  "x": null}', "[1]"),
        ({"regex": "[ab]+ <s>"}, "abba <s>", "ac"),
        ({"choice": ['say "no"', "日本"]}, 'say "no"', "no"),
        ({"grammar": 'start: "a" NUMBER\nNUMBER: /[0-9]+/'}, "a12", "b"),
        ({"grammar": 'root ::= "x" | "y" root'}, "yyx", "z"),
    ],
)
def test_texts_follow(mode, asked, yes, no) -> None:
    compiler = compiler_of(mode)
    assert follows(compiler.compile(params(**asked)), mode, yes)
    assert not follows(compiler.compile(params(**asked)), mode, no)


def test_no_special_token_and_no_id_without_text_is_allowed(mode) -> None:
    tokenizer = TOKENIZERS[mode]
    ids = allowed(compiler_of(mode).compile(params(regex="(.|\n)*")), tokenizer.vocab_size + 5)
    assert EOS in ids
    assert not {0, 1, *range(tokenizer.vocab_size, tokenizer.vocab_size + 5)} & set(ids)
    assert len(ids) > tokenizer.vocab_size / 2


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"json_schema": {"type": "strin"}}, "json_schema: Invalid type: strin"),
        (
            {"json_schema": {"properties": {"a/b": {"items": {"anyOf": [{}, {"not": {"type": "null"}}]}}}}},
            'json_schema at /properties/a~1b/items/anyOf/1: Unimplemented keys: ["not"]',
        ),
        (
            {"json_schema": {"$defs": {"x": {"pattern": "(", "type": "string"}}, "items": {"$ref": "#/$defs/x"}}},
            "json_schema at /$defs/x: regex parse error",
        ),
        (
            {"json_schema": {"properties": {"default": {"const": 2**53 + 1, "default": 2**60}}}},
            f"json_schema at /properties/default/const: {2**53 + 1} would be rounded",
        ),
        ({"json_schema": {"enum": ["a", -(10**30)]}}, f"json_schema at /enum/1: -{10**30} would be rounded"),
        (
            {"json_schema": {"items": {"$ref": "#/$defs/a~1b"}, "$defs": {"a/b": {"items": {"$ref": "#/nowhere"}}}}},
            "json_schema at /$defs/a~1b/items: Pointer '/nowhere' does not exist",
        ),
        (
            {"json_schema": {"properties": {"x": {"$ref": "#"}, "y": {"type": "strin"}}}},
            "json_schema at /properties/y: Invalid type: strin",
        ),
        ({"regex": "(a"}, "regex: "),
        ({"grammar": "start: nowhere"}, 'grammar: at 1(8): unknown name: "nowhere"'),
        ({"grammar": 'begin: "a"'}, "grammar: no start rule found"),
        ({"json_schema": {"$ref": "#"}}, "json_schema: no text follows it"),
        ({"regex": r"a[^\s\S]"}, "regex: no text follows it"),
        ({"grammar": 'start: start "a"'}, "grammar: no text follows it"),
        ({"grammar": "root ::= root"}, "grammar: no text follows it"),
        ({"grammar": "root ::= ("}, "grammar: "),
        (
            {"grammar": f'root ::= "{"a" * MAX_GBNF_BYTES}"'},
            f"grammar: it has {MAX_GBNF_BYTES + 11} characters; at most",
        ),
    ],
)
def test_refusals_say_where_and_why(asked, why) -> None:
    with pytest.raises(RequestError) as refusal:
        compiler_of().compile(params(**asked))
    assert str(refusal.value).startswith(f"INVALID_ARG: structured_output cannot be followed: {why}")
    assert "; allowed: " in str(refusal.value)


def test_integers_that_are_exact_and_those_without_effect_are_taken() -> None:
    schema = {"const": 2**53, "default": 2**60, "examples": [10**30]}
    mode = next(iter(TOKENIZERS))
    assert follows(compiler_of(mode).compile(params(json_schema=schema)), mode, str(2**53))


def test_a_text_is_compiled_once_and_the_oldest_forgotten(monkeypatch) -> None:
    monkeypatch.setattr(module, "MAX_CACHED", 2)
    compiler = compiler_of()
    first, second, third = (params(choice=[text]) for text in "abc")
    assert compiler.cached(first) is None
    for one in (first, second, first, third):
        compiler.compile(one)
    assert compiler.cached(first) is not None
    assert compiler.cached(second) is None
    assert compiler.cached(third) is not None


def test_as_many_are_kept_as_their_texts_allow(monkeypatch) -> None:
    monkeypatch.setattr(module, "MAX_CACHED_BYTES", 100)
    compiler = compiler_of()
    first, second, third = (params(choice=[letter * 30]) for letter in "abc")
    for one in (first, second, third):
        compiler.compile(one)
    assert [compiler.cached(one) is not None for one in (first, second, third)] == [False, True, True]


def test_a_refusal_is_kept(monkeypatch) -> None:
    compiler = compiler_of()
    for attempt in (compiler.compile, compiler.cached, compiler.compile):
        with pytest.raises(RequestError, match="INVALID_ARG: .* regex: "):
            attempt(params(regex="(a"))
        monkeypatch.setattr(module, "LLMatcher", None)  # nothing can be compiled any more


def test_the_search_for_the_place_ends_early_in_a_large_schema() -> None:
    """An attempt reads the whole schema, so that the time of all is the square of its size."""
    schema = {
        "properties": {f"property {number}": {"type": "string"} for number in range(3000)} | {"last": {"not": {}}}
    }
    attempts = []
    assert place_of_error(schema, lambda part: attempts.append(part) or "wrong" * (part is schema)) == ""
    assert len(attempts) < 20


@pytest.mark.parametrize(
    "asked",
    [
        {"json_schema": {"$ref": "#/$defs/d0", "$defs": {"d3000": {}} | {
            f"d{i}": {"items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(3000)
        }}},
        {"grammar": "start: r0\n" + "\n".join(f'r{i}: "x" r{i + 1}?' for i in range(6000)) + '\nr6000: "y"'},
    ],
)  # fmt: skip
def test_the_longest_chains_do_not_overflow_the_stack(asked) -> None:
    compiler = compiler_of()
    matchers = []
    usual = threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=lambda: matchers.append(compiler.compile(params(**asked))))
    thread.start()
    threading.stack_size(usual)
    thread.join()
    vocab_size = TOKENIZERS["auto"].vocab_size + 5
    assert Matcher.accept_all(matchers[:1], allowed(matchers[0], vocab_size)[:1]) == [False]


def test_a_text_that_becomes_too_complex_is_refused() -> None:
    grammar = "start: r0\n" + "\n".join(f'r{i}: r{i + 1} | "x"' for i in range(2500)) + '\nr2500: "y"'
    matcher = compiler_of().compile(params(grammar=grammar))
    [error] = Matcher.accept_all([matcher], allowed(matcher, 517)[:1])
    assert re.match("INVALID_ARG: structured_output has become too complex: .*max is 2000", str(error))


def test_a_text_that_can_neither_go_on_nor_end_is_an_error() -> None:
    compiler = compiler_of()
    asked = params(grammar='start: "a" nothing | "b"\nnothing: nothing')
    matcher, other = compiler.compile(asked), compiler.compile(asked)
    spellings = TOKENIZERS["auto"].spellings()
    a, b = spellings.index(b"a"), spellings.index(b"b")
    assert Matcher.accept_all([matcher, other], [a, b]) == [False, True]
    assert allowed(matcher, 517) == [EOS], "nothing else is left to sample"
    [error] = Matcher.accept_all([matcher], [EOS])
    assert str(error) == "INVALID_ARG: structured_output allows nothing after this text, which is not complete"


def test_the_empty_text_is_one() -> None:
    for asked in ({"regex": "a?"}, {"grammar": 'start: ""'}):
        matcher = compiler_of().compile(params(**asked))
        assert EOS in allowed(matcher, 517)
        assert Matcher.accept_all([matcher], [EOS]) == [True]


def test_matchers_of_one_text_do_not_know_each_other() -> None:
    compiler = compiler_of()
    one, other = (compiler.compile(params(regex="ab|cd")) for _ in range(2))
    before = allowed(other, 517)
    Matcher.accept_all([one], before[:1])
    assert allowed(other, 517) == before != allowed(one, 517)


def test_without_a_tokenizer_it_is_refused_with_the_reason() -> None:
    def load() -> ModelVocabulary:
        raise OSError("there is no file")

    compiler = GrammarCompiler(load)
    compiler.prepare()
    with pytest.raises(RequestError, match="INVALID_ARG: .* without a tokenizer: there is no file"):
        compiler.compile(params(regex="a"))


def test_a_panic_of_the_library_refuses_it_with_the_reason(monkeypatch) -> None:
    class PanicException(BaseException):  # the base that PyO3 gives its own
        pass

    def panic(*_: object, **__: object) -> None:
        raise PanicException("index out of bounds")

    monkeypatch.setattr(module, "LLTokenizer", panic)
    compiler = compiler_of()
    compiler.prepare()
    with pytest.raises(RequestError, match="INVALID_ARG: .* with this model's tokenizer: index out of bounds"):
        compiler.compile(params(regex="a"))


def test_tokens_taken_together_leave_matchers_as_tokens_taken_alone() -> None:
    compiler = compiler_of()
    source = random.Random(0)
    together, alone = ([compiler.compile(params(json_schema={"type": "object"})) for _ in range(20)] for _ in range(2))
    for _ in range(12):
        tokens = [source.choice(allowed(matcher, 517)) for matcher in alone]
        apart = [Matcher.accept_all([matcher], [token])[0] for matcher, token in zip(alone, tokens, strict=True)]
        assert Matcher.accept_all(together, tokens) == apart
        goes_on = [index for index, complete in enumerate(apart) if not complete]
        together, alone = ([matchers[index] for index in goes_on] for matchers in (together, alone))
        assert [allowed(matcher, 517) for matcher in together] == [allowed(matcher, 517) for matcher in alone]
    assert len(alone) > 8, "they were many to the end"
