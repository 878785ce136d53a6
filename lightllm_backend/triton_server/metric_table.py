# SPDX-License-Identifier: Apache-2.0
"""The metric table: every metric that this server adds to Triton server's, by its name without the prefix.

metrics.py makes the metrics of it and doc_tables.py their documentation; dashboards and alerts are tested against
it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from lightllm_backend.router.statistics import STEP_KINDS

PREFIX = "lightllm_"
STATUSES = ("stop", "length", "cancelled", "failed", "rejected")
# The Router has taken these requests, so they have tokens.
_ENDED = ("stop", "length", "cancelled", "failed")


@dataclass(frozen=True)
class Metric:
    """A family of metrics. labels: the values of each label; empty: any value, known only when the engine is up."""

    kind: str  # COUNTER, GAUGE or HISTOGRAM, as Triton server's Python backend calls them
    help: str
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    of_engine: bool = True  # false: each process that takes requests counts its own

    def label_sets(self) -> Iterator[dict[str, str]]:
        """All sets of labels, in order; none if the values are not known yet."""
        for values in itertools.product(*self.labels.values()):
            yield dict(zip(self.labels, values, strict=True))


METRICS: dict[str, Metric] = {
    "queued_requests": Metric("GAUGE", "Requests that wait for admission"),
    "running_requests": Metric("GAUGE", "Requests that are being computed"),
    "kv_cache_utilization": Metric("GAUGE", "Share of the KV pool that live sequences hold, from 0 to 1"),
    "kv_tokens_used": Metric("GAUGE", "Token slots of the KV pool that live sequences hold"),
    "kv_tokens_cached": Metric("GAUGE", "Token slots that only the prefix cache holds"),
    "kv_tokens_total": Metric("GAUGE", "Token slots of the KV pool"),
    "engine_up": Metric("GAUGE", "1 if the engine takes requests"),
    "info": Metric(
        "GAUGE",
        "1; the labels say what is served, with tensor-parallel ranks, token slots and tokens of the longest request; "
        "0: no more, since a restart",
        dict.fromkeys(
            ("model", "device", "dtype", "weight_dtype", "kv_dtype", "tp", "slots", "max_req_total_len", "version"), ()
        ),
    ),
    "requests_total": Metric("COUNTER", "Requests that have ended, by status", {"status": STATUSES}, of_engine=False),
    "request_tokens_total": Metric(
        "COUNTER",
        "Tokens of requests that have ended: of their prompts, computed or not, and of what they were sent",
        {"status": _ENDED, "part": ("prompt", "answer")},
        of_engine=False,
    ),
    "prompt_tokens_total": Metric("COUNTER", "Prompt tokens computed"),
    "generated_tokens_total": Metric("COUNTER", "Tokens generated"),
    "prefix_cache_queries_total": Metric("COUNTER", "Prompt tokens of admitted requests"),
    "prefix_cache_hits_total": Metric("COUNTER", "Prompt tokens that the prefix cache had when they were admitted"),
    "steps_total": Metric("COUNTER", "Steps of the model, by what they compute", {"kind": STEP_KINDS}),
    "step_tokens_total": Metric("COUNTER", "Tokens that steps have computed, by the step's kind", {"kind": STEP_KINDS}),
    "device_seconds_total": Metric("COUNTER", "Seconds that the device has computed"),
    "launch_seconds_total": Metric("COUNTER", "Seconds that the host has taken to launch steps on a GPU"),
    "preemptions_total": Metric(
        "COUNTER", "Times a running request gave its token slots to older ones (admission past_future)"
    ),
    "engine_restarts_total": Metric("COUNTER", "Times the engine was started again after it failed"),
    "queue_seconds": Metric("HISTOGRAM", "From submission to admission", of_engine=False),
    "time_to_first_token_seconds": Metric("HISTOGRAM", "From submission to the first token", of_engine=False),
    "inter_token_seconds": Metric(
        "HISTOGRAM", "Between tokens of one request (sampled above 500 a second)", of_engine=False
    ),
    "request_seconds": Metric("HISTOGRAM", "From submission to the last token", of_engine=False),
}  # fmt: skip


def samples() -> dict[str, Metric]:
    """The names of all samples as Prometheus stores them, with their metrics: a histogram has three."""
    found = {}
    for name, metric in METRICS.items():
        for suffix in ("_bucket", "_sum", "_count") if metric.kind == "HISTOGRAM" else ("",):
            found[PREFIX + name + suffix] = metric
    return found
