# SPDX-License-Identifier: Apache-2.0
"""EngineLoad: how many requests wait for the engine, in a file that the processes of one server map. No torch.

rank 0's worker writes the Router's queue, its limit and the tenant with the longest queue after each plan, and the
newest ticket of the tokenizer step that is in these numbers; generation, the newest ticket that it has refused. Door
reads them: it turns requests away at the first step while the queue is full. Reading takes no system call. The Router
stays the judge: a request that passes the door may still be refused there. The worker also writes the size of its KV
pool, which limits the length of a request.
"""

from __future__ import annotations

import hashlib
import itertools
import mmap
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path

from lightllm_backend.messages.run_directory import load_file
from lightllm_backend.request import RequestError

# Fields, each int64: four that the worker writes, one of generation, and two that the worker writes once.
_QUEUED, _LIMIT, _LONGEST, _TAKEN, _REFUSED, _POOL, _SEQUENCE = range(0, 56, 8)
_FILE_SIZE = 56
# One request passes a closed door this often, for the Router to judge: numbers of a process that has died, or of
# requests that were lost on the way to generation, cannot keep a door closed.
PASS_SECONDS = 0.1


class EngineLoad:
    """The file, mapped by this process. It is made if it is missing, and never shortened: others have mapped it."""

    def __init__(self, directory: Path) -> None:
        file = os.open(load_file(directory), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            # A new file reads as zeros, which is no limit. Its blocks are allocated now: a full disk is an error here.
            os.posix_fallocate(file, 0, _FILE_SIZE)
            self._fields = mmap.mmap(file, _FILE_SIZE)
        finally:
            os.close(file)
        self._taken = self._read(_TAKEN)

    def took(self, ticket: int) -> None:
        """The worker has a request with this ticket, which the next `publish` includes; 0: one without a ticket."""
        self._taken = max(self._taken, ticket)

    def publish(self, queued: int, limit: int, longest: str = "") -> None:
        """Write the Router's queue, its limit and the tenant with the longest queue; a limit of 0 opens all doors."""
        struct.pack_into("qqqq", self._fields, _QUEUED, queued, limit, _key(longest), self._taken)

    def refused(self, ticket: int) -> None:
        """Generation has refused a request with this ticket."""
        struct.pack_into("q", self._fields, _REFUSED, ticket)

    def publish_pool(self, tokens: int, longest: int) -> None:
        """Write how many tokens the KV pool holds, and how many of one sequence."""
        struct.pack_into("qq", self._fields, _POOL, tokens, longest)

    def pool(self) -> tuple[int, int]:
        """The tokens of the KV pool, and of the longest sequence that it holds; zeros before the worker has loaded."""
        tokens, longest = struct.unpack_from("qq", self._fields, _POOL)
        return tokens, longest

    def read(self) -> tuple[int, int]:
        """The Router's queue and its limit."""
        queued, limit = struct.unpack_from("qq", self._fields, _QUEUED)
        return queued, limit

    def is_longest(self, tenant: str) -> bool:
        """Whether no tenant has a longer queue than this one."""
        return self._read(_LONGEST) == _key(tenant)

    @property
    def arrived(self) -> int:
        """The newest ticket that is on its way no more."""
        return max(self._read(_TAKEN), self._read(_REFUSED))

    def _read(self, field: int) -> int:
        value: int = struct.unpack_from("q", self._fields, field)[0]
        return value


class Door:
    """Turns requests away while the engine's queue is full, together with what is on its way there.

    The tokenizer step gives each request that it sends on a ticket, and the worker says which are in its numbers. So
    the door decides as the Router will after its current step. The Router lets a tenant with a shorter queue take the
    place of the one with the longest, so only that one's requests are turned away here. Requests of lightllm_unary have
    no tickets: they have passed all steps but the worker, and a refusal there is cheap.
    """

    def __init__(self, load: EngineLoad, clock: Callable[[], float] = time.monotonic) -> None:
        self._load = load
        self._clock = clock
        self._last_ticket = load.arrived
        self._tickets = itertools.count(self._last_ticket + 1)
        self._passed_at = 0.0  # the last request that passed the closed door

    def check(self, tenant: str, may_pass: Callable[[], bool]) -> None:
        """Raise RequestError UNAVAILABLE if the queue is full. may_pass: called then; whether to let it in anyway."""
        queued, limit = self._load.read()
        on_the_way = max(0, self._last_ticket - self._load.arrived)
        if not limit or queued + on_the_way < limit or not self._load.is_longest(tenant) or may_pass():
            return
        now = self._clock()
        if now >= self._passed_at + PASS_SECONDS:
            self._passed_at = now
            return
        raise RequestError("UNAVAILABLE", f"the queue is full ({queued + on_the_way} requests)")

    def ticket(self) -> int:
        """A ticket for a request that the tokenizer step sends on now."""
        self._last_ticket = next(self._tickets)
        return self._last_ticket


def _key(tenant: str) -> int:
    """A tenant's name as an int64."""
    return int.from_bytes(
        hashlib.blake2b(tenant.encode(errors="surrogatepass"), digest_size=8).digest(), "big", signed=True
    )
