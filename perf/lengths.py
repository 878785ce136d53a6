# SPDX-License-Identifier: Apache-2.0
"""Prompt and output lengths of conversations, from the files in perf/data."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from perf.cases import read_lengths

DATA = Path(__file__).with_name("data")


class Lengths(NamedTuple):
    prompt: int
    output: int


def conversation_lengths(path: Path) -> list[Lengths]:
    return [Lengths(int(prompt), int(output)) for prompt, output in read_lengths(path)]
