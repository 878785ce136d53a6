# SPDX-License-Identifier: Apache-2.0
"""Chats as traffic: ShareGPT's questions and answers, each prompt with the whole conversation before it.

The lengths are those of perf/data/sharegpt_conversations.csv (see perf/sharegpt.py). ShareGPT has no times, so these
are generated: conversations begin by chance (a Poisson process), and between two questions of one lies an exponentially
distributed pause. Answers are cut at MAX_TOKENS, and a conversation ends before the exchange that would exceed the
lengths that the measured engines were started with.

The traffic begins in the middle: conversations that began before time 0 come with the questions that they have left, so
that new and old ones are mixed from the first second as they are later. What those have said so far is `Chats.before`,
which fills the prefix caches.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from perf.lengths import DATA, Lengths
from perf.shapes import LENGTHS

MAX_TOKENS = 1024  # what every request asks for
PAUSE_SECONDS = 30.0  # on average, from one question to the next
REMEMBERED = 3  # pauses before time 0 of which the caches know; 5 % of the pauses are longer


class Turn(NamedTuple):
    """One request. Those of a conversation have its number and come in order."""

    at: float  # in seconds; later if the answer before has not ended by then
    conversation: int
    prompt: int  # tokens, with all that was said before
    output: int


@cache
def conversations(path: Path = DATA / "sharegpt_conversations.csv") -> list[list[Lengths]]:
    """The requests of each conversation: their whole prompts and their answers."""
    exchanges: dict[str, list[Lengths]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            lengths = Lengths(int(row["prompt_tokens"]), int(row["output_tokens"]))
            exchanges.setdefault(row["conversation"], []).append(lengths)
    return [turns for turns in map(_turns, exchanges.values()) if turns]


def _turns(exchanges: Sequence[Lengths]) -> list[Lengths]:
    turns: list[Lengths] = []
    context = 0
    for question, answer in exchanges:
        turn = Lengths(context + question, min(answer, MAX_TOKENS))
        context = sum(turn)
        if turn.prompt > LENGTHS["max_req_input_len"] or context > LENGTHS["max_req_total_len"]:
            break
        turns.append(turn)
    return turns


class Chats(NamedTuple):
    """Traffic, and what was said shortly before it."""

    turns: list[list[Turn]]  # of each conversation
    before: list[Turn]  # in order of time: the last exchange before time 0 of each conversation, ended ones included


def chat_traffic(rate: float, seconds: float, seed: int, pause: float = PAUSE_SECONDS) -> Chats:
    """The conversations of so many seconds, with `rate` requests a second in all."""
    known = conversations()
    rng = np.random.default_rng(seed)
    begin_rate = rate / float(np.mean([len(turns) for turns in known]))
    longest = 2 * pause * max(map(len, known))  # of what began earlier, next to nothing goes on
    count = int(rng.poisson(begin_rate * (longest + seconds)))
    chats = Chats([], [])
    for number, begin in enumerate(np.sort(rng.uniform(-longest, seconds, count)).tolist()):
        lengths = known[rng.integers(len(known))]
        times = begin + np.cumsum([0.0, *rng.exponential(pause, len(lengths) - 1)])
        turns = [Turn(at, number, *turn) for at, turn in zip(times.tolist(), lengths, strict=True) if at < seconds]
        chats.before.extend([turn for turn in turns if -REMEMBERED * pause <= turn.at < 0][-1:])
        if to_come := [turn for turn in turns if turn.at >= 0]:
            chats.turns.append(to_come)
    chats.before.sort()
    return chats
