# SPDX-License-Identifier: Apache-2.0
"""The text of a sequence while its tokens come, with stop strings.

The same matcher runs where a stop string must end the generation and where text must be held back and cut, so both
agree. `Tokenizer` is here as well for those who need both; nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightllm_backend.tokenizer import TOKENIZER_MODES, Tokenizer, TokenizerError

__all__ = ["TOKENIZER_MODES", "TextStream", "Tokenizer", "TokenizerError"]


class TextStream:
    """The text of one sequence, token by token.

    `push` gives the text that may be released: whole characters, and nothing that may yet turn out to be the start of
    a stop string. `flush` gives the rest, once, when no more tokens come.

    A stop string counts if the token that completes its last character is past the first `min_tokens`; one that was
    complete before stays in the text. The first token to complete one wins and, if it completes several, the one that
    starts first. Then `stopped` is true, `num_tokens` counts the tokens up to and with that one, the text ends before
    the stop string, and later tokens are ignored. None of this depends on how the ids are divided into pushes.

    `state` is plain data, as JSON has it; a new TextStream with the same arguments goes on from there after `restore`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop_words: Sequence[str] = (),
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
    ) -> None:
        self.stopped = False
        self.num_tokens = 0
        self._decoder = tokenizer.incremental_decoder(skip_special_tokens)
        self._stop_words = tuple(word for word in stop_words if word)
        self._first_characters = frozenset(word[0] for word in self._stop_words)
        self._min_tokens = min_tokens
        # The longest end of the text so far that a stop string goes on from; all before it has been released.
        self._held = ""

    def push(self, token_ids: Sequence[int]) -> str:
        if self.stopped:
            return ""
        if not self._stop_words:
            self.num_tokens += len(token_ids)
            return self._decoder.push(token_ids)
        released = []
        for token_id in token_ids:
            self.num_tokens += 1
            released.append(self._release(self._decoder.push((token_id,))))
            if self.stopped:
                break
        return "".join(released)

    def flush(self) -> str:
        if self.stopped:
            return ""
        released = self._release(self._decoder.flush())
        held, self._held = self._held, ""
        return released + held

    def state(self) -> list[Any]:
        return [self._decoder.state(), self.num_tokens, self.stopped, self._held]

    def restore(self, state: list[Any]) -> None:
        decoder, self.num_tokens, self.stopped, self._held = state
        self._decoder.restore(decoder)

    def _release(self, new_text: str) -> str:
        """Take in the text of one token; hand out what is safe."""
        if not new_text:
            return ""
        text = self._held + new_text
        stop = self._stop_position(text, len(self._held)) if self.num_tokens > self._min_tokens else -1
        self.stopped = stop >= 0
        released = stop if self.stopped else self._hold_position(text)
        self._held = "" if self.stopped else text[released:]
        return text[:released]

    def _stop_position(self, text: str, old_length: int) -> int:
        """Where the first stop string begins that ends past `old_length`; -1 if none does."""
        found = (text.find(word, max(0, old_length - len(word) + 1)) for word in self._stop_words)
        return min((position for position in found if position >= 0), default=-1)

    def _hold_position(self, text: str) -> int:
        """Where the longest end of the text begins that is the start, and not the whole, of a stop string.

        Positions are tried from the left, so that over a sequence each character is tried about once.
        """
        for position, character in enumerate(text):
            if character in self._first_characters:
                end = text[position:]
                if any(len(end) < len(word) and word.startswith(end) for word in self._stop_words):
                    return position
        return len(text)
