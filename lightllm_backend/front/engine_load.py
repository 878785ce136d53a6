# SPDX-License-Identifier: Apache-2.0
"""The engine's load, as Triton server's metrics endpoint tells it. No torch."""

from __future__ import annotations

import asyncio
import http.client
import re
import time

MAX_AGE_S = 1.0  # however many pages are open, Triton server is asked once in so long
ANSWER_SECONDS = 2.0  # a server that has not answered by then counts as down
MAX_BYTES = 4 << 20
GAUGES = ("running_requests", "queued_requests", "kv_tokens_used", "kv_tokens_cached", "kv_tokens_total")


class EngineLoad:
    """Reads the metrics at host:port, no more often than who asks can use."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._reading = asyncio.Lock()
        self._read_at = float("-inf")
        self._text = ""

    async def read(self) -> dict[str, int | bool | None]:
        """Return `up`, whether the engine takes requests, and the values of GAUGES; None is what nobody knows."""
        return load_from_metrics(await self.text(MAX_AGE_S))

    async def longest(self) -> int | None:
        """Return the most tokens that the engine takes in a request, the answer's included; None: nobody knows."""
        return longest_from_metrics(await self.text(MAX_AGE_S))

    async def text(self, max_age: float) -> str:
        """Return the metrics as Triton server wrote them at most `max_age` seconds ago; "" if it does not answer."""
        async with self._reading:
            if time.monotonic() >= self._read_at + max_age:
                self._text = await asyncio.to_thread(_metrics, self._address)
                self._read_at = time.monotonic()
            return self._text


def longest_from_metrics(text: str) -> int | None:
    """Pick the most tokens that the engine takes in a request, the answer's included; None if it does not tell."""
    engines = re.findall(r"^lightllm_info\{(.*)\} 1$", text, re.MULTILINE)  # 0: one before a restart
    found = re.search(r'(?:^|,)max_req_total_len="(\d+)"', engines[0]) if engines else None
    return int(found[1]) if found else None


def load_from_metrics(text: str) -> dict[str, int | bool | None]:
    """Pick the engine's load from metrics in Prometheus' text format."""
    samples = dict(re.findall(r"^lightllm_(\w+)(?:\{\})? (\S+)$", text, re.MULTILINE))
    gauges = {name: int(float(samples[name])) if name in samples else None for name in GAUGES}
    return {"up": float(samples["engine_up"]) == 1 if "engine_up" in samples else None, **gauges}


def _metrics(address: str) -> str:
    """Return the metrics' text, or "" if the server does not answer."""
    connection = http.client.HTTPConnection(address, timeout=ANSWER_SECONDS)
    try:
        connection.request("GET", "/metrics")
        return connection.getresponse().read(MAX_BYTES).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return ""
    finally:
        connection.close()
