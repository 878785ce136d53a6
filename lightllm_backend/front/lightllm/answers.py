# SPDX-License-Identifier: Apache-2.0
"""Turns the engine's chunks into LightLLM's JSON: an entry for each token."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from lightllm_backend.front.log_prob import finite
from lightllm_backend.text.tokenizer import Tokenizer
from lightllm_client import Chunk, Generation

# Tokens before a chunk from which its tokens are decoded: a character has at most four bytes, a token at least one.
_NUM_BEFORE = 8


class TokenEntries:
    """Makes the entries of one answer. A chunk may hold several tokens, and has one text."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._before: list[int] = []
        self._count = 0
        self._log_prob_sum = 0.0

    def take(self, chunk: Chunk) -> list[dict[str, Any]]:
        """Return the entries of the chunk's tokens. Text without a token, at the very end, gets one with null as id."""
        texts = self._split(chunk.text, chunk.token_ids)
        log_probs: Sequence[float | None] = list(map(finite, chunk.log_probs)) or [None] * len(chunk.token_ids)
        entries = []
        for token_id, text, log_prob in zip(chunk.token_ids, texts, log_probs, strict=True):
            self._count += 1
            self._log_prob_sum += log_prob or 0.0
            entries.append(self._entry(token_id, text, log_prob, chunk))
        self._before = [*self._before, *chunk.token_ids][-_NUM_BEFORE:]
        if not entries and (chunk.text or chunk.finish_reason):
            entries.append(self._entry(None, chunk.text, None, chunk))
        return entries

    def _entry(self, token_id: int | None, text: str, log_prob: float | None, chunk: Chunk) -> dict[str, Any]:
        return {
            "id": token_id,
            "text": text,
            "logprob": log_prob,
            "cumlogprob": None if log_prob is None else self._log_prob_sum / self._count,
            "special": token_id is not None and self._tokenizer.is_special(token_id),
            "count_output_tokens": self._count,
            "prompt_tokens": chunk.num_input_tokens,
        }

    def _split(self, text: str, token_ids: Sequence[int]) -> list[str]:
        """Give each token its part of the text; the last one has what cannot be told apart."""
        texts = [""] * len(token_ids)
        if len(token_ids) > 1:
            decoder = self._tokenizer.incremental_decoder(self._skip_special_tokens, self._before)
            for number, token_id in enumerate(token_ids[:-1]):
                part = decoder.push([token_id])
                if not text.startswith(part):
                    break
                texts[number], text = part, text[len(part) :]
        if texts:
            texts[-1] = text
        return texts


def event(entry: dict[str, Any], finish_reason: str | None) -> bytes:
    """Return an event of /generate_stream. finish_reason: on the last one only."""
    token = {name: value for name, value in entry.items() if name != "cumlogprob"}
    return to_event(
        {
            "token": token,
            "generated_text": None,
            "finished": finish_reason is not None,
            "finish_reason": finish_reason,
            "details": None,
        }
    )


def to_event(value: dict[str, Any]) -> bytes:
    return b"data:" + to_json(value) + b"\n\n"


def to_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def body_of(answers: Sequence[Generation], entries: Sequence[list[dict[str, Any]]]) -> dict[str, Any]:
    """Return the body of /generate. entries: the tokens of each answer; empty if they are not wanted.

    If there is one answer, its values stand by themselves, not in lists, except for its text.
    """

    def listed(values: Sequence[Any]) -> Any:
        return values[0] if len(values) == 1 else values

    body = {
        "generated_text": [one.text for one in answers],
        "count_output_tokens": listed([one.num_output_tokens for one in answers]),
        "finish_reason": listed([one.finish_reason for one in answers]),
        "prompt_tokens": answers[0].num_input_tokens,
    }
    return {**body, "tokens": listed(entries)} if entries else body
