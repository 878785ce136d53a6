# SPDX-License-Identifier: Apache-2.0
"""From token chunks to what a client reads: the work of the detokenizer step, and of the unary entry. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from lightllm_backend.request import FinishReason, RequestOptions, TokenChunk
from lightllm_backend.text import TextStream, Tokenizer


@dataclass(frozen=True)
class DecodeContext:
    """What decoding needs to know of a request; it travels with the request's first chunk."""

    stop_words: tuple[str, ...] = ()
    min_tokens: int = 0
    skip_special_tokens: bool = True
    eos_ids: tuple[int, ...] = ()  # an EOS that ended the sequence is not text; empty with ignore_eos
    prompt_text: str = ""  # what the text begins with; empty unless the input is wanted in the output

    @classmethod
    def of(cls, options: RequestOptions, eos_ids: tuple[int, ...], prompt_text: str) -> DecodeContext:
        sampling = options.sampling
        return cls(
            stop_words=sampling.stop_words,
            min_tokens=sampling.min_tokens,
            skip_special_tokens=options.skip_special_tokens,
            eos_ids=() if sampling.ignore_eos else eos_ids,
            prompt_text="" if options.exclude_input_in_output else prompt_text,
        )


@dataclass(frozen=True)
class Response:
    """One response: what is new since the last one, but for `cumulative_logprob`, which is of all tokens so far."""

    text_output: str
    finish_reason: str
    num_input_tokens: int
    output_ids: list[int]
    output_log_probs: list[float]
    cumulative_logprob: float


class ResponseDecoder:
    """The responses of one request. Text that cannot be shown yet is held back, and its tokens with it."""

    def __init__(self, tokenizer: Tokenizer, context: DecodeContext) -> None:
        self._text = TextStream(tokenizer, context.stop_words, context.min_tokens, context.skip_special_tokens)
        self._eos_ids = frozenset(context.eos_ids)
        self._prefix = context.prompt_text
        self._held_ids: list[int] = []
        self._held_log_probs: list[float] = []
        self._num_input_tokens = 0
        self._cumulative_logprob = 0.0

    def decode(self, chunk: TokenChunk) -> Response | None:
        """The response to send now; None if there is nothing to show yet. The last chunk always gives one."""
        self._held_ids += chunk.token_ids
        self._held_log_probs += chunk.log_probs
        self._num_input_tokens = chunk.num_prompt_tokens
        self._cumulative_logprob += sum(chunk.log_probs)
        ids = chunk.token_ids
        if chunk.finish_reason is FinishReason.STOP and ids and ids[-1] in self._eos_ids:
            ids = ids[:-1]
        text = self._text.push(ids)
        if chunk.finish_reason is not None:
            return self._respond(text + self._text.flush(), chunk.finish_reason.value)
        return self._respond(text, "") if text else None

    def flush(self) -> Response | None:
        """What is still held back, for a request that an error ends; None if there is nothing."""
        text = self._text.flush()
        return self._respond(text, "") if text or self._held_ids else None

    def _respond(self, text: str, finish_reason: str) -> Response:
        response = Response(
            self._prefix + text,
            finish_reason,
            self._num_input_tokens,
            self._held_ids,
            self._held_log_probs,
            self._cumulative_logprob,
        )
        self._prefix, self._held_ids, self._held_log_probs = "", [], []
        return response
