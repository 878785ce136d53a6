# SPDX-License-Identifier: Apache-2.0
"""Log probabilities in the two forms of OpenAI's API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightllm_backend.front.log_prob import finite
from lightllm_backend.front.token_texts import TokenTexts

TopTokens = Sequence[Mapping[int, float]]  # for each token the likeliest ones, the likeliest first


class CompletionLogprobs:
    """The log probabilities of one answer of /v1/completions; `text_offset` counts on from part to part."""

    def __init__(self, texts: TokenTexts, num_top: int) -> None:
        self._texts = texts
        self._num_top = num_top
        self._offset = 0

    @property
    def is_empty(self) -> bool:
        """Whether no token has come yet."""
        return self._offset == 0

    def of(
        self, token_ids: Sequence[int], log_probs: Sequence[float | None], top_tokens: TopTokens = ()
    ) -> dict[str, Any]:
        """Return the object for more tokens. A prompt's first token has None for its log probability."""
        tokens = [self._texts[token_id] for token_id in token_ids]
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(token)
        top: list[dict[str, float] | None] | None = None
        if self._num_top:
            top = []
            for position, (token, log_prob) in enumerate(zip(tokens, log_probs, strict=True)):
                likeliest = top_tokens[position] if position < len(top_tokens) else {}
                named = {self._texts[one]: finite(value) for one, value in likeliest.items()}
                top.append(None if log_prob is None else {**named, token: finite(log_prob)})
        return {
            "tokens": tokens,
            "token_logprobs": [None if one is None else finite(one) for one in log_probs],
            "top_logprobs": top,
            "text_offset": offsets,
        }


def chat_logprobs(
    texts: TokenTexts,
    token_ids: Sequence[int],
    log_probs: Sequence[float],
    top_tokens: TopTokens = (),
) -> dict[str, Any]:
    """Return the object for tokens of a chat's answer."""
    content = []
    for position, (token_id, log_prob) in enumerate(zip(token_ids, log_probs, strict=True)):
        likeliest = top_tokens[position] if position < len(top_tokens) else {}
        top = [_entry(texts[one], value) for one, value in likeliest.items()]
        content.append({**_entry(texts[token_id], log_prob), "top_logprobs": top})
    return {"content": content, "refusal": None}


def _entry(text: str, log_prob: float) -> dict[str, Any]:
    return {"token": text, "logprob": finite(log_prob), "bytes": list(text.encode())}
