# SPDX-License-Identifier: Apache-2.0
"""Decodes a sequence while its tokens arrive, and finds stop strings in the text. Imports no torch.

The generation process uses this matcher to end a sequence, the detokenizer to hold back and cut text, so both agree.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lightllm_backend.request import RequestOptions
from lightllm_backend.text.tokenizer import Tokenizer

# Lone surrogates, which no decoded text has. A mark stands for a special token in the search for stop strings.
_FIRST_MARK, _NUM_MARKS = 0xD800, 0x800
_ANY_MARK = re.compile(r"[\ud800-\udfff]")


@dataclass
class TextState:
    """The state of a TextStream, for another one to resume from."""

    decoder: list[Any]  # the IncrementalDecoder's own state
    num_tokens: int
    stopped: bool
    held: str  # may hold marks: lone surrogates

    def pack(self) -> list[Any]:
        """Return plain data, which `unpack` restores."""
        return [self.decoder, self.num_tokens, self.stopped, self.held]

    @classmethod
    def unpack(cls, packed: list[Any]) -> TextState:
        """Raise ValueError for anything but a state; its decoder's own part is checked by `restore`."""
        if [type(value) for value in packed] != [list, int, bool, str]:
            raise ValueError("these are not the values of a text's state")
        return cls(*packed)


class TextStream:
    """Decodes one sequence token by token, after the text of `prompt_ids`, and ends it at a stop string.

    `push` returns the text that is safe to send: whole characters, and nothing that may become a stop string. `flush`
    returns the rest, once, after the last token.

    A stop string counts if the token that completes its last character comes after the first `min_tokens`; a stop
    string complete before that stays in the text. The first token that completes a stop string ends the text; if it
    completes several, the one that starts first counts. Then `stopped` is true, `num_tokens` includes that token, the
    text ends before the stop string, and the stream ignores later tokens. The division into pushes changes nothing.

    A stop string that contains special tokens matches even if these give no text: if the request skips special tokens,
    or if one is the EOS that ends the sequence, which goes to `push_eos`.

    A new TextStream with the same arguments, with or without `prompt_ids`, resumes from a `state` after `restore`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop_words: Sequence[str] = (),
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
        prompt_ids: Sequence[int] = (),
    ) -> None:
        self.stopped = False
        self.num_tokens = 0
        self._decoder = tokenizer.incremental_decoder(skip_special_tokens, prompt_ids)
        self._min_tokens = min_tokens
        self._stop_words = _StopStrings([word for word in stop_words if word])
        self._marks: dict[int, str] = {}  # marks of the special tokens in stop strings, by id; usually none
        self._marked_stop_words = _StopStrings(
            [self._mark(tokenizer.split_special(word)) for word in stop_words if tokenizer.spells_special(word)]
        )
        self._skipped_marks = self._marks if skip_special_tokens else {}
        # The longest suffix of the text, with marks, that begins a stop string; all text before it is released.
        self._held = ""

    @classmethod
    def of(cls, tokenizer: Tokenizer, options: RequestOptions, prompt_ids: Sequence[int]) -> TextStream:
        """Make the stream for the answer to a request."""
        sampling = options.sampling
        return cls(tokenizer, sampling.stop_words, sampling.min_tokens, options.skip_special_tokens, prompt_ids)

    def push(self, token_ids: Sequence[int]) -> str:
        if self.stopped:
            return ""
        if not self._stop_words:
            self.num_tokens += len(token_ids)
            return self._decoder.push(token_ids)
        released = []
        for token_id in token_ids:
            self.num_tokens += 1
            mark = self._skipped_marks.get(token_id, "")
            released.append(self._release(self._decoder.push((token_id,)) + mark))
            if self.stopped:
                break
        return "".join(released)

    def push_eos(self, token_id: int) -> str:
        """Take the EOS that ends the sequence: it gives no text but may complete a stop string."""
        if self.stopped:
            return ""
        self.num_tokens += 1
        return self._release(self._marks.get(token_id, ""))

    def flush(self) -> str:
        if self.stopped:
            return ""
        released = self._release(self._decoder.flush())
        held, self._held = self._held, ""
        return released + self._unmarked(held)

    def state(self) -> TextState:
        return TextState(self._decoder.state(), self.num_tokens, self.stopped, self._held)

    def restore(self, state: TextState) -> None:
        self.num_tokens, self.stopped, self._held = state.num_tokens, state.stopped, state.held
        self._decoder.restore(state.decoder)

    def _mark(self, pieces: Iterable[str | int]) -> str:
        """Return a stop string with marks for its special tokens."""
        return "".join(
            piece
            if isinstance(piece, str)
            else self._marks.setdefault(piece, chr(_FIRST_MARK + min(len(self._marks), _NUM_MARKS - 1)))
            for piece in pieces
        )

    def _unmarked(self, text: str) -> str:
        return _ANY_MARK.sub("", text) if self._marks else text

    def _release(self, new_text: str) -> str:
        """Append the text of one token and return the text that is safe to send."""
        if not new_text:
            return ""
        text = self._held + new_text
        stop = self._stop_position(text, len(self._held)) if self.num_tokens > self._min_tokens else -1
        self.stopped = stop >= 0
        released = stop if self.stopped else self._hold_position(text)
        self._held = "" if self.stopped else text[released:]
        return self._unmarked(text[:released])

    def _stop_position(self, text: str, old_length: int) -> int:
        """Return the position of the first stop string that ends past `old_length`, or -1."""
        if not self._marks:
            return self._stop_words.find(text, old_length)
        plain = self._stop_words.find(self._unmarked(text), len(self._unmarked(text[:old_length])))
        found = (_marked_position(text, plain) if plain >= 0 else -1, self._marked_stop_words.find(text, old_length))
        return min((position for position in found if position >= 0), default=-1)

    def _hold_position(self, text: str) -> int:
        """Return the position of the longest suffix that begins, but does not complete, a stop string."""
        if not self._marks:
            return self._stop_words.begin(text)
        plain = _marked_position(text, self._stop_words.begin(self._unmarked(text)))
        return min(plain, self._marked_stop_words.begin(text))


class _StopStrings:
    """Finds stop strings, and beginnings of them, in a text."""

    def __init__(self, words: Sequence[str]) -> None:
        self._words = words
        self._first_characters = frozenset([word[0] for word in words])

    def __bool__(self) -> bool:
        return bool(self._words)

    def find(self, text: str, old_length: int) -> int:
        """Return the position of the first stop string that ends past `old_length`, or -1."""
        found = (text.find(word, max(0, old_length - len(word) + 1)) for word in self._words)
        return min((position for position in found if position >= 0), default=-1)

    def begin(self, text: str) -> int:
        """Return the position of the longest suffix that begins, but does not complete, a stop string; else the length.

        The search goes from left to right, so over a sequence it tries each character about once.
        """
        for position, character in enumerate(text):
            if character in self._first_characters:
                end = text[position:]
                if any(len(end) < len(word) and word.startswith(end) for word in self._words):
                    return position
        return len(text)


def _marked_position(text: str, position: int) -> int:
    """Convert a position in the text without marks to one in the text with marks."""
    characters = [index for index, character in enumerate(text) if not _ANY_MARK.match(character)]
    return characters[position] if position < len(characters) else len(text)
