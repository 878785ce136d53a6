# SPDX-License-Identifier: Apache-2.0
"""EngineStats: the Router's counters, as the worker's log, its clients and the metrics read them."""

from __future__ import annotations

from dataclasses import dataclass


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
