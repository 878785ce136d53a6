# SPDX-License-Identifier: Apache-2.0
"""What the steps of an ensemble tell each other: msgpack under this server's seal. No torch.

Each message checks the types and ranges of what it unpacks, even though the seal shows that a step of ours packed it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgpack

from lightllm_backend.option_table import MAX_INT32
from lightllm_backend.options import options_from_plain, options_to_plain
from lightllm_backend.request import (
    TOP_LOG_PROB_BYTES,
    FinishReason,
    PromptLogProbs,
    RequestError,
    RequestOptions,
    TokenChunk,
)


@dataclass(frozen=True)
class EnsembleContext:
    """Tokenizer to generation: all about a request but its token ids. Its presence says that a detokenizer follows."""

    options: RequestOptions
    prompt_text: str  # for an answer that repeats the prompt; else empty
    deadline: float | None  # time.monotonic() seconds of this machine; None: no deadline
    ticket: int = 0  # the tokenizer step counts what it sends on; see engine_load.py

    def pack(self) -> bytes:
        packed: bytes = msgpack.packb((options_to_plain(self.options), self.prompt_text, self.deadline, self.ticket))
        return packed

    @classmethod
    def unpack(cls, packed: bytes) -> EnsembleContext:
        """Raise ValueError for anything but a context."""
        options, prompt_text, deadline, ticket = msgpack.unpackb(packed)
        if type(prompt_text) is not str:
            raise ValueError("the prompt is not a text")
        if deadline is not None and (type(deadline) is not float or not math.isfinite(deadline)):
            raise ValueError(f"the deadline is {deadline!r}")
        if type(ticket) is not int or not 0 <= ticket < 2**62:  # it goes into an int64 of the worker
            raise ValueError(f"ticket is {ticket!r}; allowed: an integer, 0 ≤ ticket < 2**62")
        return cls(options_from_plain(options), prompt_text, deadline, ticket)


_CHUNK_TYPES = (str, list, list, str, int, str, list, bytes, bool, bool, list, bytes, int)


@dataclass(frozen=True)
class ChunkMessage:
    """Generation to the detokenizer: a chunk, and where decoding the one before it has come to."""

    uid: str
    chunk: TokenChunk | None  # None: a probe, nothing but a question
    state: bytes = b""  # a packed DecodeState
    check_client: bool = False  # look whether the client has gone
    others: Sequence[bytes] = ()  # packed messages of the request's other answers, for the same response

    def pack(self) -> bytes:
        chunk = self.chunk or TokenChunk(self.uid, [], [])
        packed: bytes = msgpack.packb(
            (
                self.uid,
                chunk.token_ids,
                chunk.log_probs,
                chunk.finish_reason.value if chunk.finish_reason else "",
                chunk.num_prompt_tokens,
                str(chunk.error) if chunk.error else "",
                chunk.prompt_log_probs or [],
                self.state,
                self.check_client,
                self.chunk is None,
                self.others,
                chunk.top_log_probs,
                chunk.num_cached_tokens,
            ),
            unicode_errors="replace",  # an error may tell what UTF-8 cannot spell
        )
        return packed

    @classmethod
    def unpack(cls, packed: bytes) -> ChunkMessage:
        """Raise ValueError for anything but a chunk."""
        values = msgpack.unpackb(packed)
        if type(values) is not list or tuple(map(type, values)) != _CHUNK_TYPES:
            raise ValueError("these are not the values of a chunk")
        uid, token_ids, log_probs, reason, num_prompt_tokens, error, prompt, state, check_client, probe, *rest = values
        others, top_log_probs, num_cached = rest
        if probe:
            return cls(uid, None, state, check_client)
        if any(type(other) is not bytes for other in others):
            raise ValueError("another answer's message is not packed")
        _check_tokens(token_ids, log_probs, top_log_probs)
        if num_prompt_tokens < 0:
            raise ValueError(f"the prompt has {num_prompt_tokens} tokens")
        if not 0 <= num_cached <= num_prompt_tokens:
            raise ValueError(f"{num_cached} of {num_prompt_tokens} tokens are cached")
        chunk = TokenChunk(
            uid,
            token_ids,
            log_probs,
            FinishReason(reason) if reason else None,
            num_prompt_tokens,
            error=RequestError.parse(error) if error else None,
            prompt_log_probs=_prompt_log_probs(prompt) if prompt else None,
            top_log_probs=top_log_probs,
            num_cached_tokens=num_cached,
        )
        return cls(uid, chunk, state, check_client, tuple(others))

    def all(self) -> list[ChunkMessage]:
        """This message and those that go with it."""
        return [self, *map(ChunkMessage.unpack, self.others)]


def _prompt_log_probs(packed: list[Any]) -> PromptLogProbs:
    if len(packed) != 3 or any(type(array) is not bytes for array in packed):
        raise ValueError("the log probabilities of the prompt are not three arrays")
    log_probs, top_ids, top_log_probs = packed
    if len(log_probs) % 4 or len(top_ids) != len(top_log_probs) or (log_probs and len(top_ids) % len(log_probs)):
        raise ValueError("the log probabilities of the prompt are not a number for each token")
    return PromptLogProbs(log_probs, top_ids, top_log_probs)


def _check_tokens(token_ids: list[Any], log_probs: list[Any], top_log_probs: bytes) -> None:
    for token_id in token_ids:
        if type(token_id) is not int or not 0 <= token_id <= MAX_INT32:
            raise ValueError(f"a token id is {token_id!r}")
    if log_probs and (len(log_probs) != len(token_ids) or any(type(value) is not float for value in log_probs)):
        raise ValueError("the log probabilities are not a number for each token id")
    if top_log_probs and (not token_ids or len(top_log_probs) % (TOP_LOG_PROB_BYTES * len(token_ids))):
        raise ValueError("the likeliest tokens are not equally many for each token id")
