# SPDX-License-Identifier: Apache-2.0
"""The batches that static_inference runs: of equal requests, or of mixed lengths as they meet while a workload runs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

WORKLOAD = Path(__file__).with_name("data") / "workload_2000.csv"


@dataclass(frozen=True)
class Case:
    """A batch of requests that are submitted at once and generate equally many tokens."""

    prompt_lengths: tuple[int, ...]
    output_len: int  # 1: prefill alone
    mixed: bool = False

    @classmethod
    def equal(cls, batch: int, input_len: int, output_len: int) -> Case:
        return cls((input_len,) * batch, output_len)

    @property
    def batch(self) -> int:
        return len(self.prompt_lengths)

    @property
    def context_tokens(self) -> float:
        """Tokens whose K and V a decode step reads: the whole batch's, on average over the steps that are measured."""
        return sum(self.prompt_lengths) + self.batch * self.output_len / 2

    @property
    def longest(self) -> int:
        return max(self.prompt_lengths) + self.output_len

    def __str__(self) -> str:
        lengths = f"{sum(self.prompt_lengths) / self.batch:.0f} on average" if self.mixed else self.prompt_lengths[0]
        return f"{self.batch} x {lengths} x {self.output_len}"


class Sizes(click.ParamType):  # type: ignore[type-arg]
    """Numbers joined by x, as many as there are names."""

    def __init__(self, *names: str) -> None:
        self.name = "x".join(names)
        self._pattern = re.compile("x".join(["([1-9][0-9]*)"] * len(names)))

    def convert(
        self, value: str | tuple[int, ...], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        match = self._pattern.fullmatch(value)
        if match is None:
            self.fail(f"{value!r}; allowed: {self.name}, whole numbers from 1", param, ctx)
        return tuple(int(group) for group in match.groups())


class SizeList(click.ParamType):  # type: ignore[type-arg]
    """Numbers separated by commas."""

    name = "N,N,…"

    def convert(self, value: str | list[int], param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        if isinstance(value, list):
            return value
        parts = value.split(",")
        if not all(part.isdecimal() and int(part) > 0 for part in parts):
            self.fail(f"{value!r}; allowed: whole numbers from 1, separated by commas", param, ctx)
        return [int(part) for part in parts]


def mixed_case(lengths: Path, batch: int, output_len: int, mean_context: float) -> Case:
    """Requests as an engine has them at one moment of the workload, in the middle of what is measured."""
    contexts = running_contexts(read_lengths(lengths), batch, np.random.default_rng(0))
    scaled = contexts * (mean_context / contexts.mean()) - output_len / 2
    return Case(tuple(int(length) for length in scaled.round().clip(1)), output_len, mixed=True)


def read_lengths(path: Path) -> NDArray[np.float64]:
    """[requests, 2]: prompt and output tokens, the columns prompt_tokens and output_tokens of a CSV file."""
    table = np.genfromtxt(path, delimiter=",", names=True)
    names = ("prompt_tokens", "output_tokens")
    if not set(names) <= set(table.dtype.names or ()):
        raise click.ClickException(f"{path} has the columns {table.dtype.names}; needed: {', '.join(names)}")
    return np.stack([np.atleast_1d(table[name]) for name in names], axis=1)


def running_contexts(workload: NDArray[np.float64], count: int, generator: np.random.Generator) -> NDArray[np.float64]:
    """Lengths of `count` requests at a random moment: those that generate longer are met more often, and each is met
    somewhere between its first token and its last."""
    prompts, outputs = workload.T
    chosen = generator.choice(len(workload), size=count, p=outputs / outputs.sum())
    contexts: NDArray[np.float64] = prompts[chosen] + generator.uniform(0, outputs[chosen])
    return contexts
