# SPDX-License-Identifier: Apache-2.0
"""The text of a sequence while its tokens come, with stop strings.

The same matcher runs where a stop string must end the generation and where text must be held back and cut, so both
agree. `Tokenizer` is here as well for those who need both; nothing here imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lightllm_backend.request import RequestOptions
from lightllm_backend.text.tokenizer import Tokenizer

# Characters that no decoded text has. One stands for a special token where stop strings are looked for.
_FIRST_MARK, _NUM_MARKS = 0xD800, 0x800
_ANY_MARK = re.compile(r"[\ud800-\udfff]")


@dataclass
class TextState:
    """Where a TextStream has come to."""

    decoder: list[Any]  # the IncrementalDecoder's own state
    num_tokens: int
    stopped: bool
    held: str  # may hold marks, which are lone surrogates: JSON can spell them, UTF-8 cannot

    def pack(self) -> list[Any]:
        """Plain data, as JSON has it, from which TextState(*packed) makes the state again."""
        return [self.decoder, self.num_tokens, self.stopped, self.held]


class TextStream:
    """The text of one sequence, token by token, as it goes on from the text of `prompt_ids`.

    `push` gives the text that may be released: whole characters, and nothing that may yet turn out to be the start of
    a stop string. `flush` gives the rest, once, when no more tokens come.

    A stop string counts if the token that completes its last character is past the first `min_tokens`; one that was
    complete before stays in the text. The first token to complete one wins and, if it completes several, the one that
    starts first. Then `stopped` is true, `num_tokens` counts the tokens up to and with that one, the text ends before
    the stop string, and later tokens are ignored. None of this depends on how the ids are divided into pushes.

    A stop string that spells special tokens is found also where these are no text: where special tokens are skipped,
    and where one is the EOS that ends the sequence, which goes to `push_eos`.

    A new TextStream with the same arguments, with or without `prompt_ids`, goes on from a `state` after `restore`.
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
        self._marks: dict[int, str] = {}  # of the special tokens that stop strings spell: usually none
        self._marked_stop_words = _StopStrings(
            [self._mark(tokenizer.split_special(word)) for word in stop_words if tokenizer.spells_special(word)]
        )
        self._skipped_marks = self._marks if skip_special_tokens else {}
        # The longest end of the text so far, with marks, that a stop string goes on from; all before it is released.
        self._held = ""

    @classmethod
    def of(cls, tokenizer: Tokenizer, options: RequestOptions, prompt_ids: Sequence[int]) -> TextStream:
        """The text that answers a request."""
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
        """Take the EOS that ends the sequence: it is no text, but may complete a stop string."""
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
        """A stop string with marks for its special tokens."""
        return "".join(
            piece
            if isinstance(piece, str)
            else self._marks.setdefault(piece, chr(_FIRST_MARK + min(len(self._marks), _NUM_MARKS - 1)))
            for piece in pieces
        )

    def _unmarked(self, text: str) -> str:
        return _ANY_MARK.sub("", text) if self._marks else text

    def _release(self, new_text: str) -> str:
        """Take in the text of one token; hand out what is safe."""
        if not new_text:
            return ""
        text = self._held + new_text
        stop = self._stop_position(text, len(self._held)) if self.num_tokens > self._min_tokens else -1
        self.stopped = stop >= 0
        released = stop if self.stopped else self._hold_position(text)
        self._held = "" if self.stopped else text[released:]
        return self._unmarked(text[:released])

    def _stop_position(self, text: str, old_length: int) -> int:
        """Where the first stop string begins that ends past `old_length`; -1 if none does."""
        if not self._marks:
            return self._stop_words.find(text, old_length)
        plain = self._stop_words.find(self._unmarked(text), len(self._unmarked(text[:old_length])))
        found = (_marked_position(text, plain) if plain >= 0 else -1, self._marked_stop_words.find(text, old_length))
        return min((position for position in found if position >= 0), default=-1)

    def _hold_position(self, text: str) -> int:
        """Where the longest end of the text begins that is the start, and not the whole, of a stop string."""
        if not self._marks:
            return self._stop_words.begin(text)
        plain = _marked_position(text, self._stop_words.begin(self._unmarked(text)))
        return min(plain, self._marked_stop_words.begin(text))


class _StopStrings:
    def __init__(self, words: Sequence[str]) -> None:
        self._words = words
        self._first_characters = frozenset([word[0] for word in words])

    def __bool__(self) -> bool:
        return bool(self._words)

    def find(self, text: str, old_length: int) -> int:
        """Where the first one begins that ends past `old_length`; -1 if none does."""
        found = (text.find(word, max(0, old_length - len(word) + 1)) for word in self._words)
        return min((position for position in found if position >= 0), default=-1)

    def begin(self, text: str) -> int:
        """Where the longest end of the text begins that is the start, and not the whole, of one; else its length.

        Positions are tried from the left, so that over a sequence each character is tried about once.
        """
        for position, character in enumerate(text):
            if character in self._first_characters:
                end = text[position:]
                if any(len(end) < len(word) and word.startswith(end) for word in self._words):
                    return position
        return len(text)


def _marked_position(text: str, position: int) -> int:
    """Where in a text with marks the character is that has this position without them."""
    characters = [index for index, character in enumerate(text) if not _ANY_MARK.match(character)]
    return characters[position] if position < len(characters) else len(text)
