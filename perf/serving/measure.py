# SPDX-License-Identifier: Apache-2.0
"""From what clients saw to figures. Every answer is checked before it counts; a wrong one ends the benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perf.serving.workload import WorkItem

# A client process that computes for more of its time than this, or comes to its own work later than that, may have
# noticed responses late: what it measured is then its own speed.
MOST_CPU_SHARE = 0.7
MOST_LAG_SECONDS = 0.02


FIRST_CALL = -1  # the index of the request by which a client finds out that there is a server


class RequestFailed(Exception):
    """An error, or an answer that is not what was asked for; the message says which request and what came."""


@dataclass
class Trace:
    """One request as its client saw it. Times are time.monotonic(), which all processes of a machine share."""

    index: int  # in the workload
    sent: float = 0.0
    arrivals: list[float] = field(default_factory=list)  # of each response
    tokens: list[int] = field(default_factory=list)  # in each response
    prompt_tokens: int = 0  # as the server has counted them
    finish_reason: str = ""

    @property
    def output_tokens(self) -> int:
        return sum(self.tokens)


@dataclass(frozen=True)
class ClientShare:
    """How busy a client process was, and how late it came to what it had to do."""

    cpu_share: float
    loop_lag_p99: float  # seconds from when its event loop should have woken until it did
    send_lag_p99: float  # seconds from when a request was due until it was sent; 0 where none has its own time


def check(trace: Trace, item: WorkItem, streaming: bool, ignore_eos: bool) -> None:
    """RequestFailed unless the answer is exactly what was asked for."""
    wanted = item.length
    faults = []
    stopped = not ignore_eos and trace.finish_reason == "stop" and 1 <= trace.output_tokens <= wanted.output
    if trace.prompt_tokens != wanted.prompt:
        faults.append(f"the server counted {trace.prompt_tokens} prompt tokens")
    if trace.output_tokens != wanted.output and not stopped:
        faults.append(f"{trace.output_tokens} tokens came")
    if trace.finish_reason != "length" and not stopped:
        faults.append(f"finish_reason is {trace.finish_reason!r}")
    if not streaming and len(trace.arrivals) != 1:
        faults.append(f"{len(trace.arrivals)} responses came for a request that does not stream")
    if faults:
        raise RequestFailed(f"{name_of(trace.index, item)}: {'; '.join(faults)}")


def name_of(index: int, item: WorkItem) -> str:
    name = "the first call" if index == FIRST_CALL else f"request {index}"
    return f"{name} ({item.length.prompt} prompt tokens, {item.length.output} wanted)"


def summary(traces: Sequence[Trace], started: float, streaming: bool) -> dict[str, Any]:
    """All figures of a run that began at `started`; times in seconds."""
    seconds = max(trace.arrivals[-1] for trace in traces) - started
    prompt, output = sum(trace.prompt_tokens for trace in traces), sum(trace.output_tokens for trace in traces)
    figures: dict[str, Any] = {
        "requests": len(traces),
        "prompt_tokens": prompt,
        "output_tokens": output,
        "seconds": seconds,
        "requests_per_second": len(traces) / seconds,
        "output_tokens_per_second": output / seconds,
        "total_tokens_per_second": (prompt + output) / seconds,
        "tokens_per_response": output / sum(len(trace.tokens) for trace in traces),
        "end_to_end": distribution([trace.arrivals[-1] - trace.sent for trace in traces]),
    }
    if streaming:
        figures["time_to_first_token"] = distribution([trace.arrivals[0] - trace.sent for trace in traces])
        figures["time_per_output_token"] = distribution(
            [
                (trace.arrivals[-1] - trace.arrivals[0]) / later
                for trace in traces
                if (later := trace.output_tokens - trace.tokens[0])
            ]
        )
        gaps = [np.diff(trace.arrivals) for trace in traces]
        figures["inter_token"] = distribution(np.concatenate(gaps))
    return figures


def distribution(values: Sequence[float] | NDArray[np.float64]) -> dict[str, float] | None:
    """None if there are no values, as of gaps between responses if each request has one."""
    if len(values) == 0:
        return None
    p50, p90, p99 = np.percentile(values, (50, 90, 99))
    return {"mean": float(np.mean(values)), "p50": float(p50), "p90": float(p90), "p99": float(p99)}


def clients_summary(shares: Sequence[ClientShare]) -> dict[str, Any]:
    """The busiest and the latest of the processes, and whether they were the limit."""
    worst = {name: max(asdict(share)[name] for share in shares) for name in asdict(shares[0])}
    limit = worst["cpu_share"] > MOST_CPU_SHARE or max(worst["loop_lag_p99"], worst["send_lag_p99"]) > MOST_LAG_SECONDS
    return {"processes": len(shares), **worst, "were_the_limit": limit}
