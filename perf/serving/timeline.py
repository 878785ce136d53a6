# SPDX-License-Identifier: Apache-2.0
"""The engine's own account of a run: running and queued requests and the KV pool, a few times a second."""

from __future__ import annotations

import contextlib
import http.client
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from perf.serving.measure import Trace, distribution

POLL_SECONDS = 0.25
ANSWER_SECONDS = 10.0


@dataclass(frozen=True)
class Moment:
    at: float  # time.monotonic()
    running_requests: int
    queued_requests: int
    kv_tokens_used: int
    kv_tokens_cached: int
    kv_tokens_total: int
    generated_tokens_total: int
    device_seconds_total: float


FACTS = tuple(name for name in Moment.__dataclass_fields__ if name != "at")  # what the engine tells, by its own names


def moment_from_metrics(text: str, at: float) -> Moment:
    samples = dict(re.findall(r"^lightllm_(\w+)(?:\{\})? (\S+)$", text, re.MULTILINE))
    facts: dict[str, Any] = {name: float(samples.get(name, 0)) for name in FACTS}
    return Moment(at, **{name: value if "seconds" in name else int(value) for name, value in facts.items()})


def read_metrics(address: str) -> Moment:
    """What the metrics endpoint at host:port says now. OSError if there is none."""
    connection = http.client.HTTPConnection(address, timeout=ANSWER_SECONDS)
    try:
        connection.request("GET", "/metrics")
        asked = time.monotonic()
        return moment_from_metrics(connection.getresponse().read().decode(), asked)
    finally:
        connection.close()


class Timeline:
    """Asks for the moment every so often, in a thread, inside a `with` block, and once more at its end."""

    def __init__(self, ask: Callable[[], Moment]) -> None:
        self.moments: list[Moment] = []
        self._ask = ask
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="timeline", daemon=True)

    def __enter__(self) -> Timeline:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            ended = self._done.wait(POLL_SECONDS)
            with contextlib.suppress(OSError):  # a server that is gone is noticed by its requests
                self.moments.append(self._ask())
            if ended:
                return


def pool_share(moments: Sequence[Moment]) -> float | None:
    """The share of token slots that live sequences hold while requests wait, as a time average; None if none waits."""
    shares = [
        moment.kv_tokens_used / moment.kv_tokens_total
        for moment in moments
        if moment.queued_requests > 0 and moment.kv_tokens_total > 0
    ]
    return float(np.mean(shares)) if shares else None


def device_share(before: Moment, moments: Sequence[Moment], seconds: float) -> float | None:
    """Of the time from the first request to the last token, the share in which the engine's device computed; None on
    engines that do not tell."""
    computed = moments[-1].device_seconds_total - before.device_seconds_total if moments else 0.0
    return computed / seconds if computed > 0 else None


def delivery_lag(before: Moment, moments: Sequence[Moment], traces: Sequence[Trace]) -> dict[str, float] | None:
    """How far the clients are behind the engine: the time from when the engine has told that it has made n tokens until
    its clients have n.

    Responses carry no time of the server's, so this goes by the totals. The engine's total is up to 0.2 s old when it
    is read, so a lag may be longer by that; while fewer tokens are made than received (a probe's are nobody's) it is 0.
    """
    arrivals = np.concatenate([trace.arrivals for trace in traces])
    order = np.argsort(arrivals)
    received = np.cumsum(np.concatenate([trace.tokens for trace in traces])[order])
    lags = []
    for moment in moments:
        made = moment.generated_tokens_total - before.generated_tokens_total
        if 0 < made <= received[-1]:
            reached = arrivals[order[np.searchsorted(received, made)]]
            lags.append(max(0.0, float(reached) - moment.at))
    return distribution(lags)


def rows(moments: Sequence[Moment], started: float) -> list[dict[str, Any]]:
    """For the result: seconds since the start instead of the machine's clock."""
    return [asdict(moment) | {"at": round(moment.at - started, 3)} for moment in moments]
