# SPDX-License-Identifier: Apache-2.0
"""Request, its options, and the TokenChunks that answer it. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, NamedTuple

MAX_STOP_TOKEN_IDS = 32
MAX_LOGIT_BIASES = 300
MAX_TOP_LOG_PROBS = 20
MAX_ANSWERS = 16
# A likely token and its log probability, as numpy describes the bytes.
TOP_LOG_PROB = [("token_id", "<i4"), ("log_prob", "<f4")]
TOP_LOG_PROB_BYTES = 8
AS_MANY_AS_FIT = -1  # of max_tokens, until the engine's client has replaced it


class FinishReason(str, Enum):
    """The reason why a request ended. With FAILED and REJECTED the client gets an error instead."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    FAILED = "failed"
    REJECTED = "rejected"  # the Router has not taken it


class RequestError(Exception):
    """An error that ends one request. The client reads `str(error)`: `CODE: message`.

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


def as_tuples(value: Any) -> Any:
    """Turn the lists in a plain value, at any depth, into tuples."""
    return tuple(map(as_tuples, value)) if isinstance(value, list) else value


@dataclass(frozen=True)
class SamplingParams:
    """The parameters that choose the next token and end the sequence. options.py has checked the values."""

    max_tokens: int = 16
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1  # -1 or 0: off
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0  # 64 bits, unsigned
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_words: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()  # at most MAX_STOP_TOKEN_IDS; each ends the sequence like EOS
    logit_bias: tuple[tuple[int, float], ...] = ()  # at most MAX_LOGIT_BIASES different token ids, each with its bias
    return_log_probs: bool = False
    top_logprobs: int = 0  # so many of the likeliest tokens beside each; not without return_log_probs
    # How many of the likeliest tokens each prompt token is compared with; -1: no log probabilities of the prompt.
    prompt_logprobs: int = -1
    n: int = 1  # answers to the prompt
    structured_output: str = ""  # what the text must follow, as structured_output.py writes it; empty: nothing
    allowed_token_ids: tuple[int, ...] = ()  # empty: all

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> SamplingParams:
        """Build the params from JSON or msgpack, which turn tuples into lists."""
        return cls(**{name: as_tuples(value) for name, value in values.items()})

    def ending_ids(self, eos_ids: Sequence[int]) -> tuple[int, ...]:
        """Return the ids that end the sequence: the model's EOS, unless ignored, and the request's own."""
        return (*(() if self.ignore_eos else eos_ids), *self.stop_token_ids)

    @property
    def max_sampled(self) -> int:
        """The most tokens that the engine samples. With max_tokens 0 it samples one, which nobody gets."""
        return max(self.max_tokens, 1)

    @property
    def greedy(self) -> bool:
        return not self.do_sample or self.temperature == 0.0

    @property
    def masked(self) -> bool:
        """Whether only some tokens are allowed."""
        return bool(self.structured_output or self.allowed_token_ids)

    @property
    def penalised(self) -> bool:
        """Whether sampling changes the logits first."""
        return (
            self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.repetition_penalty != 1.0
            or (self.min_tokens > 0 and (bool(self.stop_token_ids) or not self.ignore_eos))
        )


@dataclass(frozen=True)
class RequestOptions:
    """All options of a request; the prompt is apart."""

    sampling: SamplingParams = field(default_factory=SamplingParams)
    stream: bool = False
    exclude_input_in_output: bool = True
    parse_special: bool = True
    skip_special_tokens: bool = True
    tenant: str = ""
    priority: int = 0


# The values of options that a request does not name. seed and do_sample have none: `parse_request` draws a seed and
# derives do_sample from other options.
DEFAULTS = {**vars(RequestOptions()), **vars(SamplingParams())}
del DEFAULTS["sampling"], DEFAULTS["seed"], DEFAULTS["do_sample"]


@dataclass(frozen=True)
class Request:
    """One prompt to continue. The submitting process makes `uid`, unique within that process."""

    uid: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    deadline: float | None = None  # time.monotonic() seconds of this machine; None: no deadline
    urgent: bool = False  # ahead of all waiting requests: a probe, which would prove nothing behind users' requests
    tenant: str = ""  # whose share of the engine it takes; all that name none share one
    priority: int = 0  # among the requests of its tenant; the lowest goes first
    ticket: int = 0  # what the tokenizer step has counted it as; see engine_load.py

    @property
    def uids(self) -> tuple[str, ...]:
        """The uid of each of the n answers; the first is the request's own."""
        return (self.uid, *(f"{self.uid}/{index}" for index in range(1, self.sampling.n)))

    def copies(self) -> list[Request]:
        """A request for each of the n answers. Answer i draws as it would alone with seed + i.

        The log probabilities of the prompt come with the first one.
        """
        sampling = self.sampling
        if sampling.n == 1:
            return [self]
        first = replace(sampling, n=1)
        others = (
            replace(first, seed=(sampling.seed + index) % 2**64, prompt_logprobs=-1) for index in range(1, sampling.n)
        )
        return [replace(self, uid=uid, sampling=one) for uid, one in zip(self.uids, (first, *others), strict=True)]


class PromptLogProbs(NamedTuple):
    """The log probabilities of a prompt's tokens but the first, packed as numpy packs them, since they may be many."""

    log_probs: bytes = b""  # [tokens] float32
    top_ids: bytes = b""  # [tokens, k] int32, the k likeliest tokens in the place of each, the likeliest first
    top_log_probs: bytes = b""  # [tokens, k] float32


@dataclass(slots=True)
class TokenChunk:
    """New tokens of one request. Only the last chunk of a request has a finish_reason.

    Treat a chunk as immutable. The class is not frozen, since a frozen instance takes four times as long to create, and
    a step creates up to a thousand.
    """

    uid: str
    token_ids: list[int]
    log_probs: list[float]  # one per token id if the request asks for them, else empty
    finish_reason: FinishReason | None = None
    num_prompt_tokens: int = 0
    queue_seconds: float | None = None  # on the first chunk only: the wait for admission
    error: RequestError | None = None  # with CANCELLED (a deadline) and FAILED
    prompt_log_probs: PromptLogProbs | None = None  # on the first chunk only, if the request asks for them
    # The likeliest tokens in place of each token id: packed TOP_LOG_PROBs [tokens, k], likeliest first; or none.
    top_log_probs: bytes = b""
    num_cached_tokens: int = 0  # on the first chunk only: prompt tokens that the prefix cache had

    def first(self, count: int) -> TokenChunk:
        """The chunk with its first `count` tokens alone."""
        bytes_each = len(self.top_log_probs) // max(1, len(self.token_ids))
        return replace(
            self,
            token_ids=self.token_ids[:count],
            log_probs=self.log_probs[:count],
            top_log_probs=self.top_log_probs[: bytes_each * count],
        )
