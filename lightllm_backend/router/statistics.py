# SPDX-License-Identifier: Apache-2.0
"""EngineStats: the Router's counters, as the worker's log, its clients and the metrics read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

STEP_KINDS = ("prefill", "decode", "mixed")  # what a step computes: prompt tokens, decodes or both


def no_steps() -> dict[str, int]:
    """Return a count of zero for each kind of step."""
    return dict.fromkeys(STEP_KINDS, 0)


@dataclass(frozen=True)
class EngineStats:
    """The Router's counters at one moment; totals count from the worker's start."""

    queued_requests: int = 0
    running_requests: int = 0
    kv_tokens_used: int = 0  # by running sequences
    kv_tokens_cached: int = 0  # by the prefix cache alone
    kv_tokens_total: int = 0
    prompt_tokens_total: int = 0  # planned for prefill
    generated_tokens_total: int = 0  # given out in chunks
    preemptions_total: int = 0
    device_seconds_total: float = 0.0
    launch_seconds_total: float = 0.0  # of the host, for a GPU
    steps_total: Mapping[str, int] = field(default_factory=no_steps)  # planned, by kind
    step_tokens_total: Mapping[str, int] = field(default_factory=no_steps)  # that these compute
    prefix_cache_queries_total: int = 0  # prompt tokens of admitted requests
    prefix_cache_hits_total: int = 0  # those of them that the prefix cache had
