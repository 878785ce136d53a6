# SPDX-License-Identifier: Apache-2.0
"""What a client asks for, and the chunks of tokens that answer it. Standard library only."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

MAX_STOP_TOKEN_IDS = 32


class FinishReason(str, Enum):
    """Why a request ended. FAILED never reaches a client as a reason: its request ends with an error."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    FAILED = "failed"


class RequestError(Exception):
    """An error that one request ends with. `str(error)` is what the client reads: `CODE: message`.

    code: INVALID_ARG, UNAVAILABLE, CANCELLED, NOT_FOUND or INTERNAL.
    """

    CODES = ("INVALID_ARG", "UNAVAILABLE", "CANCELLED", "NOT_FOUND", "INTERNAL")

    def __init__(self, code: str, message: str) -> None:
        assert code in self.CODES, code
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message

    @classmethod
    def parse(cls, text: str) -> RequestError:
        """The error whose `str` is `text`; text without a known code is INTERNAL."""
        code, _, message = text.partition(": ")
        return cls(code, message) if code in cls.CODES else cls("INTERNAL", text)


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen and when the sequence ends. Values are valid by construction (see options.py)."""

    max_tokens: int = 16
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1  # -1 or 0: off
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0  # 64 bits, unsigned
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_words: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()  # at most MAX_STOP_TOKEN_IDS; they end the sequence as EOS does
    return_log_probs: bool = False

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> SamplingParams:
        """The params whose fields came through JSON or msgpack, which turn tuples into lists."""
        fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return cls(**fields)

    def ending_ids(self, eos_ids: Sequence[int]) -> tuple[int, ...]:
        """The tokens that end the sequence: the model's EOS unless it is ignored, and the request's own."""
        return (*(() if self.ignore_eos else eos_ids), *self.stop_token_ids)

    @property
    def greedy(self) -> bool:
        return not self.do_sample or self.temperature == 0.0

    @property
    def penalised(self) -> bool:
        """Whether the logits must be changed before the choice."""
        return (
            self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.repetition_penalty != 1.0
            or (self.min_tokens > 0 and (bool(self.stop_token_ids) or not self.ignore_eos))
        )


@dataclass(frozen=True)
class RequestOptions:
    """Everything that a request says beside its prompt."""

    sampling: SamplingParams = field(default_factory=SamplingParams)
    stream: bool = False
    exclude_input_in_output: bool = True
    parse_special: bool = True
    skip_special_tokens: bool = True

    def to_json(self) -> str:
        """The options as a `sampling_parameters` string, from which `parse_request` makes the same options again."""
        values = {**vars(self), **vars(self.sampling)}
        del values["sampling"]
        return json.dumps({name: value for name, value in values.items() if value != _DEFAULTS.get(name)})


# What need not be said; where nothing is said of these, a seed is drawn, and do_sample follows from others.
_DEFAULTS = {**vars(RequestOptions()), **vars(SamplingParams())}
del _DEFAULTS["seed"], _DEFAULTS["do_sample"]


@dataclass(frozen=True)
class Request:
    """One prompt to be continued. `uid` is made by the process that submits and is unique in it."""

    uid: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    deadline: float | None = None  # time.monotonic() seconds of this machine; None: no deadline
    urgent: bool = False  # goes before all that wait: a probe, which would prove nothing behind users


@dataclass(slots=True)
class TokenChunk:
    """New tokens of one request. Exactly one chunk of a request has a finish_reason: its last.

    Nobody changes one; it is not frozen because a frozen one takes four times as long to make, a thousand times a step.
    """

    uid: str
    token_ids: list[int]
    log_probs: list[float]  # as long as token_ids where they were asked for, else empty
    finish_reason: FinishReason | None = None
    num_prompt_tokens: int = 0
    queue_seconds: float | None = None  # on the first chunk only: how long the request waited for admission
    error: RequestError | None = None  # with CANCELLED (a deadline) and FAILED
