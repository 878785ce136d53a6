# SPDX-License-Identifier: Apache-2.0
"""llguidance and xgrammar beside each other on the CPU: what compiling a schema and masking 64 sequences cost.

    pip install --target /tmp/xgrammar --no-deps xgrammar==0.2.9 apache-tvm-ffi==0.1.15.post2
    PYTHONPATH=/tmp/xgrammar python -m perf.structured_output

xgrammar is left out where it is not installed; the product does not need it. Each library has a process of its own, so
that its import and memory are its own. There are two vocabularies: the embedded model's, a byte-level BPE of 49,152
tokens, and 128,256 tokens, the same with further ones that are made as BPE makes them, by joining two of its tokens.

A document is made of random tokens that its masks allow, so that all kinds of states come up; the masks of 64 sequences
are those of two copies of each of perf/data/json_schemas.json, each library by its own defaults. Documents that have
ended are validated.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import multiprocessing
import random
import sys
import time
from pathlib import Path
from typing import Any

import click
import jsonschema
import numpy as np
import psutil
from numpy.typing import NDArray
from referencing.exceptions import Unresolvable
from tokenizers import Tokenizer

from lightllm_backend.launch.embedded_model import embedded_model_directory
from perf.record import RESULTS, circumstances, write_result

SCHEMAS: dict[str, Any] = json.loads((RESULTS.parent / "data" / "json_schemas.json").read_text())
LARGE_VOCABULARY = 128_256
SEQUENCES, STEPS = 64, 100
DOCUMENTS, DOCUMENT_TOKENS = 10, 40  # for each of FEATURES
EOS_ID = 2
# One feature each. Refused is better than ignored: an ignored keyword gives documents that are not valid.
FEATURES: dict[str, Any] = {
    "not": {"not": {"type": "string"}},
    "if": {"if": {"type": "string"}, "then": {"minLength": 3}},
    "oneOf, disjoint": {"oneOf": [{"type": "string"}, {"type": "integer"}]},
    "oneOf, overlapping": {"oneOf": [{"type": "number"}, {"type": "integer"}]},
    "uniqueItems": {"type": "array", "uniqueItems": True},
    "contains": {"type": "array", "contains": {"type": "integer"}},
    "dependentRequired": {"type": "object", "dependentRequired": {"a": ["b"]}},
    "propertyNames": {"type": "object", "propertyNames": {"pattern": "^a"}},
    "minProperties": {"type": "object", "minProperties": 2},
    "patternProperties": {"type": "object", "patternProperties": {"^a": {"type": "integer"}}},
    "multipleOf": {"type": "integer", "multipleOf": 7},
    "number bounds": {"type": "number", "minimum": -0.5, "exclusiveMaximum": 12.25},
    "pattern with lookahead": {"type": "string", "pattern": "(?=a)b"},
    "unknown format": {"type": "string", "format": "nonsense"},
    "unevaluatedProperties": {"type": "object", "unevaluatedProperties": False},
    "remote $ref": {"$ref": "urn:another-document"},
    "unknown type": {"type": "strin"},
    "false": False,
}


def tokenizer_json(large: bool) -> str:
    """The embedded model's tokenizer; large: with further tokens, each two of its tokens joined."""
    definition: dict[str, Any] = json.loads((embedded_model_directory() / "tokenizer.json").read_text())
    vocabulary: dict[str, int] = definition["model"]["vocab"]
    if large:
        special = {token["content"] for token in definition["added_tokens"]}
        beginnings = [token for token in vocabulary if 1 < len(token) < 12 and token not in special]
        endings = [token for token in beginnings if token.isascii() and token.isalnum()]
        chooser = random.Random(0)
        while len(vocabulary) < LARGE_VOCABULARY:
            vocabulary.setdefault(chooser.choice(beginnings) + chooser.choice(endings), len(vocabulary))
    return json.dumps(definition)


class Guidance:
    """llguidance."""

    def __init__(self, tokenizer: str, vocab_size: int) -> None:
        from llguidance import LLMatcher, LLTokenizer

        self._matcher = LLMatcher
        self._tokenizer = LLTokenizer(tokenizer, n_vocab=vocab_size, eos_token=[EOS_ID])

    def compile(self, schema: Any) -> Any:
        matcher = self._matcher(self._tokenizer, self._matcher.grammar_from_json_schema(json.dumps(schema)))
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        return matcher

    def matcher(self, compiled: Any) -> Any:
        return compiled.deep_copy()

    def mask(self, matcher: Any, mask: NDArray[np.int32]) -> None:
        matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)

    def accept(self, matcher: Any, token: int) -> bool:
        """Whether the document goes on."""
        matcher.consume_token(token)
        return not matcher.is_stopped()


class Grammar:
    """xgrammar."""

    def __init__(self, tokenizer: str, vocab_size: int) -> None:
        import torch
        import xgrammar

        self._library, self._torch = xgrammar, torch
        vocabulary = json.loads(tokenizer)["model"]["vocab"]
        tokens = sorted(vocabulary, key=vocabulary.__getitem__)
        info = xgrammar.TokenizerInfo(
            tokens, xgrammar.VocabType.BYTE_LEVEL, vocab_size=vocab_size, stop_token_ids=[EOS_ID]
        )
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=2, cache_enabled=False)

    def compile(self, schema: Any) -> Any:
        return self._compiler.compile_json_schema(json.dumps(schema))

    def matcher(self, compiled: Any) -> Any:
        return self._library.GrammarMatcher(compiled)

    def mask(self, matcher: Any, mask: NDArray[np.int32]) -> None:
        matcher.fill_next_token_bitmask(self._torch.from_numpy(mask[None]))

    def accept(self, matcher: Any, token: int) -> bool:
        matcher.accept_token(token)
        return not matcher.is_terminated()


LIBRARIES: dict[str, type[Guidance | Grammar]] = {"llguidance": Guidance, "xgrammar": Grammar}


def measure(name: str, large: bool) -> dict[str, Any]:
    """The figures of a library with a vocabulary, in CPU milliseconds unless the name says otherwise."""
    tokenizer = tokenizer_json(large)
    decoder = Tokenizer.from_str(tokenizer)
    process, started = psutil.Process(), time.process_time()
    before = process.memory_info().rss
    library = LIBRARIES[name](tokenizer, decoder.get_vocab_size())
    row = np.empty(-(-decoder.get_vocab_size() // 32), dtype=np.int32)
    library.mask(library.matcher(library.compile({"type": "object"})), row)  # the first takes longer
    ready, loaded = time.process_time(), process.memory_info().rss
    compiled, compile_ms = {}, {}
    for schema_name, schema in SCHEMAS.items():
        begun, cpu = time.perf_counter(), time.process_time()
        try:
            compiled[schema_name] = library.compile(schema)
        except (RuntimeError, ValueError) as error:
            compile_ms[schema_name] = str(error).splitlines()[0][:120]
            continue
        library.mask(library.matcher(compiled[schema_name]), row)
        compile_ms[schema_name] = [1e3 * (time.process_time() - cpu), 1e3 * (time.perf_counter() - begun)]
    return {
        "library": name,
        "version": importlib.metadata.version(name),
        "vocabulary": decoder.get_vocab_size(),
        "loads_torch": "torch" in sys.modules,
        "start_ms": 1e3 * (ready - started),
        "start_mib": (loaded - before) / 2**20,
        "compiled_mib": (process.memory_info().rss - loaded) / 2**20,
        "compile_and_first_mask_ms_and_wall_ms": compile_ms,
        "compile_and_first_mask": percentiles([times[0] for times in compile_ms.values() if isinstance(times, list)]),
        **steps_of_64(library, compiled, decoder),
        "features": {feature: outcome(library, schema, decoder) for feature, schema in FEATURES.items()},
    }


def steps_of_64(library: Guidance | Grammar, compiled: dict[str, Any], decoder: Tokenizer) -> dict[str, Any]:
    """CPU milliseconds a step of 64 sequences on one thread, making masks and accepting tokens; and the documents."""
    sequences = [_Document(library, *list(compiled.items())[index % len(compiled)]) for index in range(SEQUENCES)]
    masks = np.full((SEQUENCES, -(-decoder.get_vocab_size() // 32)), -1, dtype=np.int32)
    chooser = np.random.default_rng(0)
    mask_ms, accept_ms, invalid, ended = [], [], [], 0
    for _ in range(STEPS):
        begun = time.process_time()
        for sequence, mask in zip(sequences, masks, strict=True):
            library.mask(sequence.matcher, mask)
        masked = time.process_time()
        tokens = [random_token(mask, chooser) for mask in masks]
        chosen = time.process_time()
        goes_on = [library.accept(one.matcher, token) for one, token in zip(sequences, tokens, strict=True)]
        accept_ms.append(1e3 * (time.process_time() - chosen))
        mask_ms.append(1e3 * (masked - begun))
        for index, (sequence, token) in enumerate(zip(sequences, tokens, strict=True)):
            sequence.tokens.append(token)
            if not goes_on[index]:
                ended += 1
                if wrong := problem(sequence.tokens, SCHEMAS[sequence.name], decoder):
                    invalid.append(f"{sequence.name}: {wrong}")
                sequences[index] = _Document(library, sequence.name, sequence.compiled)
    return {
        "step_of_64": {"mask": percentiles(mask_ms), "accept": percentiles(accept_ms)},
        "documents": {"ended": ended, "invalid": invalid},
    }


class _Document:
    def __init__(self, library: Guidance | Grammar, name: str, compiled: Any) -> None:
        self.name, self.compiled = name, compiled
        self.matcher = library.matcher(compiled)
        self.tokens: list[int] = []


def outcome(library: Guidance | Grammar, schema: Any, decoder: Tokenizer) -> str:
    """Whether a schema is refused, or how many of its documents are valid that end within DOCUMENT_TOKENS."""
    try:
        compiled = library.compile(schema)
    except (RuntimeError, ValueError) as error:
        return f"refused: {str(error).splitlines()[0][:120]}"
    chooser = np.random.default_rng(0)
    mask = np.empty(-(-decoder.get_vocab_size() // 32), dtype=np.int32)
    ended = valid = 0
    for _ in range(DOCUMENTS):
        document = _Document(library, "", compiled)
        goes_on = True
        while goes_on and len(document.tokens) < DOCUMENT_TOKENS:
            library.mask(document.matcher, mask)
            document.tokens.append(random_token(mask, chooser))
            goes_on = library.accept(document.matcher, document.tokens[-1])
        ended += not goes_on
        valid += not goes_on and problem(document.tokens, schema, decoder) is None
    return f"taken: {valid} of {ended} documents are valid"


def random_token(mask: NDArray[np.int32], chooser: np.random.Generator) -> int:
    return int(chooser.choice(np.unpackbits(mask.view(np.uint8), bitorder="little").nonzero()[0]))


def problem(tokens: list[int], schema: Any, decoder: Tokenizer) -> str | None:
    """Return what is wrong with a document, or None."""
    text = decoder.decode([token for token in tokens if token != EOS_ID], skip_special_tokens=False)
    try:
        jsonschema.validators.validator_for(schema)(schema).validate(json.loads(text))
    except (ValueError, jsonschema.ValidationError) as error:
        return f"{str(error).splitlines()[0][:120]}: {text[:80]!r}"
    except (jsonschema.exceptions.UnknownType, Unresolvable):
        return "the schema cannot be read"
    return None


def percentiles(values: list[float]) -> dict[str, float]:
    return {name: float(np.percentile(values, at)) for name, at in (("p50", 50), ("p99", 99), ("max", 100))}


@click.command(help=__doc__)
@click.option("--out", default=RESULTS / "structured_output.json", type=click.Path(path_type=Path))
def main(out: Path) -> None:
    chosen = [name for name in LIBRARIES if importlib.util.find_spec(name)]
    for name in LIBRARIES.keys() - chosen:
        print(f"{name} is not installed, so it is left out; --help says how to install it")
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        rows = []
        for name in chosen:
            for large in (False, True):
                rows.append(pool.apply(measure, (name, large)))
                print(json.dumps(rows[-1]), flush=True)
    write_result(out, {"benchmark": "structured_output", **circumstances(None), "rows": rows})


if __name__ == "__main__":
    main()
