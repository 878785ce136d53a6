# SPDX-License-Identifier: Apache-2.0
"""How long a step takes, interpolated between the batches that a stored result of static_inference has measured.

A step of n decodes, with L tokens of context in all and P new prompt tokens, takes

    base(n) + L · kv_token_seconds + max(0, prefill(P) − base(1))

base(n) is a measured decode step less its reading of K and V, prefill(P) a measured prefill; both are linear between
the measured points. A step reads the weights once for its decodes and its prompts, hence the last term. Reading K and V
takes what two measured steps of equally many sequences and different contexts differ by; a result without such a pair
takes the time per byte from a result that has one.
"""

from __future__ import annotations

import json
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightllm_backend.router.batch import Batch
from perf.record import RESULTS


class StepTimes(NamedTuple):
    """Times in seconds. Called with a batch and the tokens in use, it tells the step's."""

    batches: NDArray[np.float64]  # [m] ascending
    base: NDArray[np.float64]  # [m] a decode step of so many sequences without their K and V
    kv_token_seconds: float
    prompts: NDArray[np.float64]  # [k] ascending, from 0
    prefill: NDArray[np.float64]  # [k]
    pool_tokens: int
    result: dict[str, Any]

    @classmethod
    def stored(cls, name: str, kv_from: str | None = None) -> StepTimes:
        """Read perf/results/static_inference_{name}.json. kv_from: another one with the time per byte of K and V."""
        result = _read(name)
        other = _read(kv_from) if kv_from else result
        kv_token_seconds = _kv_token_seconds(other) * _kv_token_bytes(result) / _kv_token_bytes(other)
        decodes = sorted(
            (row["batch"], row["step_ms"] / 1e3 - row["batch"] * row["mean_context"] * kv_token_seconds)
            for row in result["rows"]
            if "step_ms" in row and (row["mean_context"] < 1000 or row["mixed"])
        )
        batches, base = np.array(decodes, dtype=np.float64).T
        # A step takes at most batch_max_tokens, 8192 on a GPU: larger prefills are several steps.
        prefills = sorted(
            (row["prompt_tokens"], row["prefill_ms"] / 1e3)
            for row in result["rows"]
            if row["prompt_tokens"] <= 16384 and not row["mixed"] and row["output_len"] > 1
        )
        prompts, prefill = np.array([(0, base[0]), *prefills], dtype=np.float64).T
        return cls(batches, base, kv_token_seconds, prompts, prefill, result["engine"]["pool_tokens"], result)

    @property
    def most_running(self) -> int:
        """The largest batch that was measured: beyond it the model knows nothing."""
        return int(self.batches[-1])

    def decode_seconds(self, num_decodes: int, kv_tokens: int) -> float:
        return float(np.interp(num_decodes, self.batches, self.base)) + kv_tokens * self.kv_token_seconds

    def __call__(self, batch: Batch, kv_tokens: int) -> float:
        prompt_tokens = int(batch.lengths[batch.num_decodes :].sum())
        seconds = self.decode_seconds(batch.num_decodes, kv_tokens)
        if prompt_tokens:
            seconds += max(0.0, float(np.interp(prompt_tokens, self.prompts, self.prefill) - self.base[0]))
        return seconds


def _kv_token_seconds(result: dict[str, Any]) -> float:
    """From the two steps of equally many sequences whose contexts differ most."""
    rows = [row for row in result["rows"] if "step_ms" in row and not row["mixed"]]
    pairs = [
        (other["mean_context"] - one["mean_context"], one, other)
        for one, other in combinations(sorted(rows, key=lambda row: float(row["mean_context"])), 2)
        if one["batch"] == other["batch"] and one["mean_context"] < other["mean_context"]
    ]
    longer, one, other = max(pairs, key=lambda pair: pair[0])
    return float((other["step_ms"] - one["step_ms"]) / 1e3 / (longer * one["batch"]))


def _kv_token_bytes(result: dict[str, Any]) -> float:
    """K and V of a token, on one GPU."""
    engine = result["engine"]
    pool_bytes = engine["memory"]["KV pool"] if "memory" in engine else engine["pool_bytes"]
    return float(pool_bytes / engine["pool_tokens"])


def _read(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((RESULTS / f"static_inference_{name}.json").read_text())
    return result
