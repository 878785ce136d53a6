# SPDX-License-Identifier: Apache-2.0
"""A workload: lengths from a table, a dataset or a random generator, prompts of these lengths, arrival times.

Everything is drawn from one seed, so that two runs with the same options ask the same.
"""

from __future__ import annotations

import csv
import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # ids need no tokenizer
    from lightllm_backend.text.tokenizer import Tokenizer

# LightLLM's own benchmark leaves out what is shorter or longer than this.
SHORTEST, LONGEST_PROMPT, LONGEST_TOTAL = 4, 1024, 2048
FIRST_ORDINARY_ID = 3  # after unk, bos and eos, or what other vocabularies have there


class WorkloadError(Exception):
    """The workload cannot be made; the message says what to change."""


@dataclass(frozen=True)
class Length:
    prompt: int
    output: int


@dataclass(frozen=True)
class WorkItem:
    """One request: `length.prompt` is what the server must count, `length.output` what it must make."""

    prompt: str | tuple[int, ...]
    length: Length


def lengths_from_table(path: Path) -> list[Length]:
    """Two columns with a heading: prompt and output tokens."""
    lengths = []
    with path.open(newline="") as file:
        rows = csv.reader(file)
        next(rows, None)
        for row in rows:
            try:
                prompt, output = map(int, row)
            except ValueError:
                prompt = output = 0
            if prompt < 1 or output < 1:
                raise WorkloadError(f"{path}:{rows.line_num} is {','.join(row)!r}; allowed: two whole numbers ≥ 1")
            lengths.append(Length(prompt, output))
    return lengths


def first_exchanges(path: Path) -> Iterator[tuple[str, str]]:
    """The first thing that the human says and the first answer of each conversation of a ShareGPT file."""
    for turns in _conversations(path):
        prompt = None
        for turn in turns:
            if prompt is None:
                prompt = turn["value"] if turn["from"] == "human" else None
            elif turn["from"] == "gpt":
                yield prompt, turn["value"]
                break


def all_exchanges(path: Path) -> Iterator[list[tuple[str, str]]]:
    """The questions and answers of each conversation of a ShareGPT file that begins with a human and takes turns.

    Who published the file has cut conversations into pieces of about 2,048 tokens; those that begin with an answer are
    left out.
    """
    for turns in _conversations(path):
        speakers = [turn["from"] for turn in turns]
        length = len(turns) // 2 * 2
        if length and speakers[:length] == ["human", "gpt"] * (length // 2):
            texts = [turn["value"] for turn in turns]
            yield list(zip(texts[:length:2], texts[1:length:2], strict=True))


def _conversations(path: Path) -> Iterator[list[dict[str, str]]]:
    """The turns of each conversation. A file that was cut short gives what is whole in it."""
    text = path.read_text()
    decoder = json.JSONDecoder()
    position = text.find("{")
    while position >= 0:
        try:
            conversation, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError:
            return
        yield conversation["conversations"]
        position = text.find("{", end)


def items_from_dataset(path: Path, tokenizer: Tokenizer, count: int, seed: int, as_text: bool) -> list[WorkItem]:
    """A sample of the dataset's conversations, as LightLLM's benchmark takes it."""
    exchanges = list(first_exchanges(path))
    random.Random(seed).shuffle(exchanges)
    items: list[WorkItem] = []
    for prompt, answer in exchanges:
        if len(items) == count:
            break
        ids = tokenizer.encode(prompt)
        length = Length(len(ids), len(tokenizer.encode(answer)))
        if (
            min(length.prompt, length.output) >= SHORTEST
            and length.prompt <= LONGEST_PROMPT
            and length.prompt + length.output <= LONGEST_TOTAL
        ):
            items.append(WorkItem(prompt if as_text else tuple(ids), length))
    return items


def id_prompts(lengths: Sequence[Length], vocab_size: int, seed: int, shared_prefix: int = 0) -> list[WorkItem]:
    """Random token ids; the first `shared_prefix` of them, beside the length, are the same in all prompts."""
    ids = range(FIRST_ORDINARY_ID, vocab_size)
    rng = random.Random(seed)
    prefix = tuple(rng.choices(ids, k=shared_prefix))
    return [
        WorkItem(prefix + tuple(rng.choices(ids, k=length.prompt)), _longer(length, shared_prefix))
        for length in lengths
    ]


def text_prompts(lengths: Sequence[Length], tokenizer: Tokenizer, seed: int, shared_prefix: int = 0) -> list[WorkItem]:
    """Random words that are exactly so many tokens, what the tokenizer puts in front included."""
    words = _one_token_words(tokenizer)
    rng = random.Random(seed)
    prefix = rng.choices(words, k=shared_prefix)
    return [
        WorkItem(_text(tokenizer, words, rng, prefix, length.prompt + shared_prefix), _longer(length, shared_prefix))
        for length in lengths
    ]


def arrival_times(count: int, rate: float, seed: int) -> list[float]:
    """Seconds after the start: a Poisson process of `rate` a second that begins with an arrival; all at once if inf."""
    rng = random.Random(seed)
    now, times = 0.0, []
    for _ in range(count):
        times.append(now)
        now += 0.0 if math.isinf(rate) else rng.expovariate(rate)
    return times


def _longer(length: Length, prefix: int) -> Length:
    return Length(length.prompt + prefix, length.output)


def _one_token_words(tokenizer: Tokenizer) -> list[str]:
    """Words of the vocabulary that are one token after another word."""
    pieces = {tokenizer.decode([token_id]).strip() for token_id in range(tokenizer.vocab_size)}
    alone = len(tokenizer.encode("a"))
    words = [
        word
        for word in sorted(pieces)
        if word.isascii() and word.isalpha() and len(tokenizer.encode(f"a {word}")) == alone + 1
    ]
    if not words:
        raise WorkloadError("the tokenizer has no words of one token, so no text of an exact length can be made")
    return words


def _text(tokenizer: Tokenizer, words: list[str], rng: random.Random, prefix: list[str], tokens: int) -> str:
    chosen = [*prefix, *rng.choices(words, k=tokens - len(prefix))]
    for _ in range(tokens):
        excess = len(tokenizer.encode(" ".join(chosen))) - tokens
        if excess == 0:
            return " ".join(chosen)
        if excess > 0:
            del chosen[max(len(chosen) - excess, 1) :]
        else:
            chosen += rng.choices(words, k=-excess)
    raise WorkloadError(f"no text of exactly {tokens} tokens was found; give --prompts ids")
