# SPDX-License-Identifier: Apache-2.0
"""Turns token chunks into responses for the client, in the detokenizer and in lightllm_unary. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgpack

from lightllm_backend.request import FinishReason, PromptLogProbs, RequestOptions, TokenChunk
from lightllm_backend.text.text_stream import TextState, TextStream
from lightllm_backend.text.tokenizer import Tokenizer


@dataclass
class DecodeState:
    """The decoding state of a request. It travels, packed, from each chunk of the request to the next."""

    stop_words: Sequence[str] = ()
    min_tokens: int = 0
    skip_special_tokens: bool = True
    # The model's EOS and the request's stop_token_ids; the id that ends the sequence gives no text.
    eos_ids: Sequence[int] = ()
    prefix: str = ""  # the next text begins with it: at first the prompt, if the output includes the input
    text: TextState | None = None  # None: no prompt goes before
    held_ids: list[int] = field(default_factory=list)
    held_log_probs: list[float] = field(default_factory=list)
    num_input_tokens: int = 0
    cumulative_logprob: float = 0.0
    index: int = 0  # number of the answer among those to the same prompt
    held_top_log_probs: bytes = b""
    num_cached_tokens: int = 0

    @classmethod
    def of(cls, options: RequestOptions, eos_ids: Sequence[int], prompt_text: str, text: TextStream) -> DecodeState:
        """The state before the first token; `text` has taken the prompt."""
        sampling = options.sampling
        return cls(
            stop_words=sampling.stop_words,
            min_tokens=sampling.min_tokens,
            skip_special_tokens=options.skip_special_tokens,
            eos_ids=sampling.ending_ids(eos_ids),
            prefix="" if options.exclude_input_in_output else prompt_text,
            text=text.state(),
        )

    def pack(self) -> bytes:
        """Pack the fields' values in order."""
        values = [value.pack() if isinstance(value, TextState) else value for value in vars(self).values()]
        packed: bytes = msgpack.packb(values, unicode_errors="surrogatepass")  # held text may have lone surrogates
        return packed

    @classmethod
    def unpack(cls, packed: bytes) -> DecodeState:
        """Raise ValueError for anything but a state."""
        values = msgpack.unpackb(packed, unicode_errors="surrogatepass")
        if type(values) is not list or tuple(map(type, values)) not in _STATE_TYPES:
            raise ValueError("these are not the values of a decoding state")
        state = cls(*values)
        for items, kind in ((state.stop_words, str), (state.eos_ids, int), (state.held_ids, int)):
            if any(type(item) is not kind for item in items):
                raise ValueError(f"a decoding state holds something that is not {kind.__name__}")
        if any(type(item) is not float for item in state.held_log_probs):
            raise ValueError("a decoding state holds a log probability that is no number")
        text: Any = state.text
        state.text = None if text is None else TextState.unpack(text)
        return state


# The types of a DecodeState's values, with a text and without.
_STATE_TYPES = tuple(
    (list, int, bool, list, str, text, list, list, int, float, int, bytes, int) for text in (list, type(None))
)  # fmt: skip


@dataclass(frozen=True)
class Response:
    """One response. It holds what is new since the last one; `cumulative_logprob` alone covers all tokens so far."""

    text_output: str
    finish_reason: str
    num_input_tokens: int
    output_ids: list[int]
    output_log_probs: list[float]
    cumulative_logprob: float
    prompt_log_probs: PromptLogProbs | None = None  # on the first response only, if the request asks for them
    index: int = 0  # number of the answer among those to the same prompt
    top_log_probs: bytes = b""  # packed TOP_LOG_PROBs [len(output_ids), k], or none
    num_cached_tokens: int = 0


class ResponseDecoder:
    """Decodes the chunks of one request into responses. Holds back text that may yet change, with its tokens.

    A new ResponseDecoder resumes from `state`.
    """

    def __init__(self, tokenizer: Tokenizer, state: DecodeState) -> None:
        self._text = TextStream(tokenizer, state.stop_words, state.min_tokens, state.skip_special_tokens)
        if state.text is not None:
            self._text.restore(state.text)
        self._state = state

    def decode(self, chunk: TokenChunk) -> Response | None:
        """Return the response to send now, or None if there is nothing new to show. The last chunk always gives one."""
        state = self._state
        state.held_ids += chunk.token_ids
        state.held_log_probs += chunk.log_probs
        state.held_top_log_probs += chunk.top_log_probs
        state.num_input_tokens = chunk.num_prompt_tokens
        state.num_cached_tokens = state.num_cached_tokens or chunk.num_cached_tokens  # the first chunk tells
        state.cumulative_logprob += sum(chunk.log_probs)
        ids = chunk.token_ids
        if chunk.finish_reason is FinishReason.STOP and ids and ids[-1] in state.eos_ids:
            text = self._text.push(ids[:-1]) + self._text.push_eos(ids[-1])
        else:
            text = self._text.push(ids)
        prompt = chunk.prompt_log_probs
        if chunk.finish_reason is not None:
            return self._respond(text + self._text.flush(), chunk.finish_reason.value, prompt)
        return self._respond(text, "", prompt) if text or prompt else None

    def flush(self) -> Response | None:
        """Return the text and tokens still held back when an error ends the request, or None."""
        text = self._text.flush()
        return self._respond(text, "") if text or self._state.held_ids else None

    def state(self) -> DecodeState:
        """Return the state after the chunks decoded so far."""
        self._state.text = self._text.state()
        return self._state

    def _respond(self, text: str, finish_reason: str, prompt: PromptLogProbs | None = None) -> Response:
        state = self._state
        response = Response(
            state.prefix + text,
            finish_reason,
            state.num_input_tokens,
            state.held_ids,
            state.held_log_probs,
            state.cumulative_logprob,
            prompt,
            state.index,
            state.held_top_log_probs,
            state.num_cached_tokens,
        )
        state.prefix, state.held_ids, state.held_log_probs, state.held_top_log_probs = "", [], [], b""
        return response
