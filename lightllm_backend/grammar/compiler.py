# SPDX-License-Identifier: Apache-2.0
"""GrammarCompiler: compiles what a text must follow, with llguidance. docs/structured_output.md says why that library.

Rank 0's worker alone imports it. llguidance releases the interpreter's lock while it compiles.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper, grammar_from

from lightllm_backend.grammar.matcher import Matcher, is_dead_end
from lightllm_backend.grammar.schema_place import MAX_EXACT_INTEGER, place_of_error, place_of_inexact_integer
from lightllm_backend.request import RequestError, SamplingParams
from lightllm_backend.text.tokenizer import Tokenizer

# What is kept. A compiled text takes 40 KB for a usual schema, and from 20 to 280 times its own bytes for a large one.
MAX_CACHED = 256
MAX_CACHED_BYTES = 2 * 2**20  # of texts, not compiled
STACK_BYTES = 256 * 2**20  # 40 MiB are enough for the longest chains that 128 KiB of text can hold
# llguidance translates GBNF to Lark in Python, which takes the interpreter's lock from the loop: half a second for so
# much, and the square of it.
MAX_GBNF_BYTES = 16 * 1024
# Between the tokens of a JSON text: nothing, a space, or a new line with its indentation. Without a limit a model may
# write white space to the end.
WHITE_SPACE = r"(\r?\n[ \t]{0,40}| )"
_WHITE_SPACE_OPTION = {"whitespace_pattern": WHITE_SPACE}
# llguidance takes 60 for the seconds of any minute; RFC 3339 has it in leap seconds alone.
_NO_SECOND_60 = {"pattern": "^[^:]*:[^:]*:[0-5]"}
_NO_SCHEMAS = ("enum", "const", "default", "examples")  # keywords whose values only look like schemas
_LIMITS = LLParserLimits(verbose_errors=False)


class ModelVocabulary(NamedTuple):
    """What a compiler must know of the model."""

    tokenizer: Tokenizer
    size: int  # of the model's vocabulary; the tokenizer's may be smaller or larger
    eos_ids: Sequence[int]


class GrammarCompiler:
    """Compiles each text once and keeps the newest, refusals too. Thread-safe.

    llguidance recurses as deep as rules and references follow each other, so `compile` is for threads with STACK_BYTES.
    """

    def __init__(self, load: Callable[[], ModelVocabulary]) -> None:
        """load: called once, at the first use. If it fails, structured output is refused with the reason."""
        self._load = load
        self._eos_ids: tuple[int, ...] = ()
        self._loading = threading.Lock()
        self._tokenizer: LLTokenizer | RequestError | None = None
        self._guard = threading.Lock()
        self._compiled: OrderedDict[str, LLMatcher | RequestError] = OrderedDict()  # the least recently used first
        self._cached_bytes = 0

    def cached(self, sampling: SamplingParams) -> Matcher | None:
        """Return a new matcher for the request if what it must follow is compiled already; raises as `compile`."""
        with self._guard:
            compiled = self._compiled.get(sampling.structured_output)
            if compiled is None:
                return None
            self._compiled.move_to_end(sampling.structured_output)
        return self._matcher(compiled, sampling)

    def compile(self, sampling: SamplingParams) -> Matcher:
        """Return a new matcher for the request; takes milliseconds. Raises RequestError for what cannot be followed."""
        known = self.cached(sampling)
        if known is not None:
            return known
        compiled: LLMatcher | RequestError
        try:
            compiled = self._compile(sampling.structured_output)
        except RequestError as refusal:
            compiled = refusal
        self._keep(sampling.structured_output, compiled)
        return self._matcher(compiled, sampling)

    def prepare(self) -> None:
        """Load the tokenizer, unless it is there."""
        self._ready_tokenizer()

    def _keep(self, text: str, compiled: LLMatcher | RequestError) -> None:
        with self._guard:
            if text not in self._compiled:  # else another thread was quicker
                self._compiled[text] = compiled
                self._cached_bytes += len(text)
            while len(self._compiled) > MAX_CACHED or self._cached_bytes > MAX_CACHED_BYTES:
                oldest, _ = self._compiled.popitem(last=False)
                self._cached_bytes -= len(oldest)

    def _matcher(self, compiled: LLMatcher | RequestError, sampling: SamplingParams) -> Matcher:
        if isinstance(compiled, RequestError):
            raise RequestError(compiled.code, compiled.message)
        return Matcher(compiled.deep_copy(), sampling, self._eos_ids)

    def _compile(self, structured_output: str) -> LLMatcher:
        tokenizer = self._ready_tokenizer()
        if isinstance(tokenizer, RequestError):
            raise tokenizer
        [(kind, value)] = json.loads(structured_output).items()

        def attempt(value: Any) -> tuple[LLMatcher | None, str]:
            try:
                compiled = LLMatcher(tokenizer, _grammar(kind, value), log_level=0, limits=_LIMITS)
            except ValueError as error:
                return None, _reason(str(error))
            return compiled, _reason(compiled.get_error())

        def refusal(place: str, reason: str, allowed: str) -> RequestError:
            where = f"{kind} at {place}" if place else kind
            told = f"structured_output cannot be followed: {where}: {reason}; allowed: {allowed}"
            return RequestError("INVALID_ARG", told)

        if kind == "json_schema" and (inexact := place_of_inexact_integer(value)):
            place, number = inexact
            allowed = f"integers from -{MAX_EXACT_INTEGER} to {MAX_EXACT_INTEGER}"
            raise refusal(place, f"{number} would be rounded", allowed)
        compiled, reason = attempt(value)
        if reason or compiled is None:
            place = place_of_error(value, lambda schema: attempt(schema)[1]) if kind == "json_schema" else ""
            raise refusal(place, reason, f"a {kind} that llguidance can follow (docs/structured_output.md)")
        compiled.compute_bitmask()  # copies begin with what this has found out
        if compiled.is_error():
            reason = "no text follows it" if is_dead_end(compiled) else _reason(compiled.get_error())
            raise refusal("", reason, f"a {kind} that a text of the model's tokens can follow")
        return compiled

    def _ready_tokenizer(self) -> LLTokenizer | RequestError:
        with self._loading:
            if self._tokenizer is None:
                self._tokenizer = self._make_tokenizer()
            return self._tokenizer

    def _make_tokenizer(self) -> LLTokenizer | RequestError:
        try:
            tokenizer, vocab_size, eos_ids = self._load()
        except Exception as error:  # noqa: BLE001 (whatever it is, requests without structured output can do without)
            return RequestError("INVALID_ARG", f"there is no structured output without a tokenizer: {error}")
        self._eos_ids = tuple(eos_ids)
        try:
            made = _library_tokenizer(tokenizer, vocab_size, list(eos_ids))
            # The first mask of a tokenizer takes a third of a second.
            LLMatcher(made, _json_grammar({"type": "object"}), log_level=0).compute_bitmask()
            return made
        except BaseException as error:  # noqa: BLE001 (as above; a panic in Rust is no Exception)
            return RequestError("INVALID_ARG", f"there is no structured output with this model's tokenizer: {error}")


def _library_tokenizer(tokenizer: Tokenizer, vocab_size: int, eos_ids: list[int]) -> LLTokenizer:
    """Raise ValueError or TypeError if llguidance cannot use the tokenizer."""
    definition = tokenizer.definition() if tokenizer.has_fixed_bytes else None
    if definition is None:
        spellings = tokenizer.spellings()
        if spellings is None:
            raise ValueError("its tokens have no fixed bytes")
        padding = [b""] * (vocab_size - len(spellings))  # ids that the model has and the tokenizer has not
        wrapped = TokenizerWrapper(_Vocabulary(tokenizer, [*spellings, *padding][:vocab_size], eos_ids))
        return LLTokenizer(wrapped, n_vocab=vocab_size, eos_token=eos_ids or None)
    # From the definition llguidance makes a tokenizer of its own, which needs no interpreter's lock.
    plain = json.loads(definition)
    plain["added_tokens"] = [token for token in plain["added_tokens"] if token["id"] < vocab_size]
    _respell_special_tokens(plain)
    return LLTokenizer(json.dumps(plain), n_vocab=vocab_size, eos_token=eos_ids or None)


def _respell_special_tokens(definition: dict[str, Any]) -> None:
    """Give special tokens spellings that no text has.

    llguidance encodes text that the grammar leaves no choice about, and a text may spell a special token, which it then
    allows alone but does not take as that text.
    """
    added, model = definition["added_tokens"], definition["model"]
    spellings = {token["content"]: f"\ufdd0{token['id']}" for token in added if token["special"]}
    for token in added:
        token["content"] = spellings.get(token["content"], token["content"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {spellings.get(token, token): token_id for token, token_id in model["vocab"].items()}
    else:
        model["vocab"] = [[spellings.get(token, token), score] for token, score in model["vocab"]]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = spellings.get(model["unk_token"], model["unk_token"])


class _Vocabulary:
    """A tokenizer as llguidance's TokenizerWrapper takes it."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, tokens: list[bytes], eos_ids: list[int]) -> None:
        self.tokens = tokens
        self.special_token_ids = [token_id for token_id in tokenizer.special_ids if token_id < len(tokens)]
        self.eos_token_id = eos_ids[0] if eos_ids else self.special_token_ids[0]
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        """Encode a text that the grammar leaves no choice about: llguidance then allows the first of its tokens alone.

        So a BOS in front would be the next token.
        """
        return self._tokenizer.encode_continuation(text)


def _reason(error: str) -> str:
    """Leave out where the library has found the error: in a part that other parts refer to it names the part."""
    return error.partition("\n  while processing ")[0].strip()


def _grammar(kind: str, value: Any) -> str:
    """What llguidance compiles."""
    if kind == "json_schema":
        return _json_grammar(value)
    if kind == "json_object":
        return _json_grammar({"type": "object"})
    if kind == "regex":
        return LLMatcher.grammar_from_regex(value)
    if kind == "choice":
        return LLMatcher.grammar_from_lark(
            "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in value)
        )
    if "::=" not in value:  # llguidance would take a grammar in Lark's notation without the rule `start` for GBNF
        return LLMatcher.grammar_from_lark(value)
    if len(value) > MAX_GBNF_BYTES:
        raise ValueError(f"it has {len(value)} characters; at most {MAX_GBNF_BYTES} are taken in GBNF")
    return grammar_from("grammar", value)


def _json_grammar(schema: Any) -> str:
    text = json.dumps(_without_leap_seconds(schema))
    return LLMatcher.grammar_from_json_schema(text, defaults=_WHITE_SPACE_OPTION)  # type: ignore[arg-type]


def _without_leap_seconds(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_without_leap_seconds(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    changed = {key: value if key in _NO_SCHEMAS else _without_leap_seconds(value) for key, value in schema.items()}
    if schema.get("format") in ("date-time", "time") and isinstance(schema.get("allOf", []), list):
        changed["allOf"] = [*changed.get("allOf", []), _NO_SECOND_60]
    return changed
