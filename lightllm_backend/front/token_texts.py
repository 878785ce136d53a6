# SPDX-License-Identifier: Apache-2.0
"""TokenTexts: the texts of single tokens, for log probabilities."""

from __future__ import annotations

from lightllm_backend.text.tokenizer import Tokenizer


class TokenTexts:
    """The text of each token by its id; a token that is a part of a character has U+FFFD."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}

    def __getitem__(self, token_id: int) -> str:
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self._tokenizer.decode([token_id], skip_special_tokens=False)
        return text
