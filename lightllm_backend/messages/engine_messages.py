# SPDX-License-Identifier: Apache-2.0
"""The messages between an EngineClient and rank 0's worker. No torch.

to the worker:    Submit, Cancel, Stop, CloseEngine
from the worker:  Ready (the first), Tokens, Stats
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightllm_backend.lengths import LengthLimits
from lightllm_backend.messages.channel import Message
from lightllm_backend.request import FinishReason, PromptLogProbs, Request, RequestError, SamplingParams, TokenChunk
from lightllm_backend.router.statistics import EngineStats

# What a request is told that cannot end, since a process of the engine has.
ENGINE_STOPPED = RequestError("UNAVAILABLE", "the engine stopped while the request was running; try again")


@dataclass(frozen=True)
class EngineInfo:
    """The facts about an engine that its worker finds out at start."""

    model: str
    dtype: str
    device: str
    vocab_size: int
    eos_ids: tuple[int, ...]
    lengths: LengthLimits
    pool_tokens: int
    memory: dict[str, int]  # bytes on each rank's device, by part
    weight_dtype: str = ""  # of the linear layers: a data type or a checkpoint's method of quantisation
    kv_dtype: str = ""
    tp: int = 1


@dataclass
class Submit(Message):
    """A new request. Tokens call its answers by `number` and the numbers after it, which are the client's choice."""

    request: Request
    number: int

    def pack(self) -> tuple[Any, ...]:
        request = self.request
        return (
            request.uid, request.prompt_ids, vars(request.sampling), request.deadline, request.urgent, request.tenant,
            request.priority, request.ticket, self.number,
        )  # fmt: skip

    @classmethod
    def unpack(cls, *packed: Any) -> Submit:
        uid, prompt_ids, sampling, *others, number = packed
        return cls(Request(uid, tuple(prompt_ids), SamplingParams.from_plain(sampling), *others), number)


@dataclass
class Cancel(Message):
    """The client of this request is gone."""

    uid: str


@dataclass
class Stop(Message):
    """This request needs no more tokens: a stop string was found."""

    uid: str


@dataclass
class CloseEngine(Message):
    """All requests of all clients end with UNAVAILABLE and this reason; later ones are refused with it.

    drain: those that run may go on.
    """

    reason: str
    drain: bool = False


@dataclass
class Ready(Message):
    """The worker takes requests."""

    info: EngineInfo

    def pack(self) -> tuple[Any, ...]:
        return (asdict(self.info),)

    @classmethod
    def unpack(cls, *packed: Any) -> Ready:
        [fields] = packed
        typed = {"eos_ids": tuple(fields["eos_ids"]), "lengths": LengthLimits(**fields["lengths"])}
        return cls(EngineInfo(**{**fields, **typed}))


@dataclass(eq=False)
class Tokens(Message):
    """The tokens of one step for one client, each request at most once.

    Most requests get one more token and go on: two packed arrays say that. The others have a chunk each: first tokens,
    tokens with log probabilities, ends.
    """

    numbers: NDArray[np.int64]  # [n] of the requests that go on
    token_ids: NDArray[np.int32]  # [n]
    chunks: list[tuple[int, TokenChunk]]  # with the numbers of their requests

    def pack(self) -> tuple[Any, ...]:
        chunks = [(number, _pack_chunk(chunk)) for number, chunk in self.chunks]
        return self.numbers.tobytes(), self.token_ids.tobytes(), chunks

    @classmethod
    def unpack(cls, *packed: Any) -> Tokens:
        numbers, token_ids, chunks = packed
        return cls(
            np.frombuffer(numbers, dtype=np.int64),
            np.frombuffer(token_ids, dtype=np.int32),
            [(number, _unpack_chunk(*fields)) for number, fields in chunks],
        )


@dataclass
class Stats(Message):
    """The Router's counters, sent when they have changed."""

    stats: EngineStats

    def pack(self) -> tuple[Any, ...]:
        return (vars(self.stats),)

    @classmethod
    def unpack(cls, *packed: Any) -> Stats:
        [fields] = packed
        return cls(EngineStats(**fields))


def _pack_chunk(chunk: TokenChunk) -> tuple[Any, ...]:
    reason = chunk.finish_reason.value if chunk.finish_reason else None
    error = str(chunk.error) if chunk.error else None
    return (
        chunk.uid, chunk.token_ids, chunk.log_probs, reason, chunk.num_prompt_tokens, chunk.queue_seconds, error,
        chunk.prompt_log_probs,
        chunk.top_log_probs,
        chunk.num_cached_tokens,
    )  # fmt: skip


def _unpack_chunk(
    uid: str, token_ids: list[int], log_probs: list[float], reason: str | None, num_prompt_tokens: int,
    queue_seconds: float | None, error: str | None, prompt_log_probs: list[bytes] | None, top_log_probs: bytes,
    num_cached_tokens: int,
) -> TokenChunk:  # fmt: skip
    return TokenChunk(
        uid, token_ids, log_probs, FinishReason(reason) if reason else None, num_prompt_tokens, queue_seconds,
        RequestError.parse(error) if error else None, PromptLogProbs(*prompt_log_probs) if prompt_log_probs else None,
        top_log_probs, num_cached_tokens,
    )  # fmt: skip
