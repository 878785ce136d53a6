# SPDX-License-Identifier: Apache-2.0
"""What the steps of an ensemble tell each other beside token ids: JSON text inside a tensor. No torch."""

from __future__ import annotations

import json
from dataclasses import dataclass


@dataclass(frozen=True)
class EnsembleContext:
    """Tokenizer to generation: what generation could not know. Its presence says that a detokenizer step follows."""

    prompt_text: str  # for an answer that repeats the prompt; else empty
    deadline: float | None  # time.monotonic() seconds of this machine; None: no deadline
    ticket: int = 0  # the tokenizer step counts what it sends on; see engine_load.py

    def __post_init__(self) -> None:
        if type(self.ticket) is not int or not 0 <= self.ticket < 2**62:  # it goes into an int64 of the worker
            raise ValueError(f"ticket is {self.ticket!r}; allowed: an integer, 0 ≤ ticket < 2**62")

    def to_json(self) -> str:
        return json.dumps(vars(self))

    @classmethod
    def from_json(cls, text: str) -> EnsembleContext:
        return cls(**json.loads(text))


@dataclass
class ChunkDetails:
    """Generation to the detokenizer: everything about a chunk but its token ids and log probabilities.

    A direct caller of generation reads the first four fields. The others are in the JSON only if they are set.
    """

    uid: str
    finish_reason: str = ""
    num_input_tokens: int = 0
    error: str = ""
    state: str = ""  # a DecodeState as JSON: where decoding the chunk before it has come to
    return_address: str = ""  # where the return channel leads to
    check_client: bool = False  # look whether the client has gone
    probe: bool = False  # nothing but a question: there is no chunk

    def to_json(self) -> str:
        values = vars(self)
        return json.dumps({name: value for name, value in values.items() if value or name in _ALWAYS})

    @classmethod
    def from_json(cls, text: str) -> ChunkDetails:
        return cls(**json.loads(text))


_ALWAYS = frozenset(["uid", "finish_reason", "num_input_tokens", "error"])
