# SPDX-License-Identifier: Apache-2.0
"""Incremental decoding: turns token ids into whole characters, at a cost proportional to the new tokens.

If each token has a fixed spelling in bytes (byte-level BPE as in BLOOM and LLaMA-3, byte-fallback vocabularies as in
LLaMA), an incremental UTF-8 decoder over those bytes is exact. For any other tokenizer, each push decodes a window of
the last tokens again.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

REPLACEMENT_CHARACTER = "\ufffd"
# The character that sentencepiece writes for a space.
SPACE_MARK = "\u2581"
_MAX_CHARACTER_BYTES = 4
# Numbers of final prompt tokens to try as context; a larger one only if the smaller one has no text.
_CONTEXT_SIZES = (8, 64, 512)
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")

# Each byte-fallback token that is not UTF-8 becomes one U+FFFD, as in sentencepiece; Python's own "replace" makes one
# U+FFFD of a whole truncated character.
ONE_PER_BYTE = "lightllm_backend.one_per_byte"


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return REPLACEMENT_CHARACTER * (error.end - error.start), error.end


codecs.register_error(ONE_PER_BYTE, _replace_each_byte)


class IncrementalDecoder(Protocol):
    """Takes token ids and returns whole characters; `flush` returns the incomplete rest.

    `begin` takes the prompt that the sequence continues. `state` is short plain data; a new decoder of the same
    tokenizer resumes from it after `restore`, which raises ValueError for anything but a state.
    """

    def begin(self, prompt_ids: Sequence[int]) -> None: ...

    def push(self, token_ids: Sequence[int]) -> str: ...

    def flush(self) -> str: ...

    def state(self) -> list[Any]: ...

    def restore(self, state: list[Any]) -> None: ...


class _Spelling(dict[int, bytes]):
    """Caches the bytes of each token at its first use.

    A token without bytes is not cached: a prompt may hold any number of ids that no token has.
    """

    def __init__(self, spell: Callable[[int], bytes], without_text: Iterable[int] = ()) -> None:
        super().__init__(dict.fromkeys(without_text, b""))
        self._spell = spell

    def __missing__(self, token_id: int) -> bytes:
        spelled = self._spell(int(token_id))
        if spelled:
            self[token_id] = spelled
        return spelled


class ByteDecoder:
    """Decodes incrementally for a tokenizer whose tokens each have a fixed spelling in bytes."""

    def __init__(self, spelling: _Spelling, errors: str, drop_first_space: bool) -> None:
        self._spelling = spelling
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors)
        self._drop_space = drop_first_space  # true until the first text

    def begin(self, prompt_ids: Sequence[int]) -> None:
        """Decode only the end of the prompt: later text depends on no more bytes than a character has."""
        end = b""
        for token_id in reversed(prompt_ids):
            end = self._spelling[token_id] + end
            if len(end) >= _MAX_CHARACTER_BYTES:
                break
        self._dropping(self._utf8.decode(end))

    def push(self, token_ids: Sequence[int]) -> str:
        return self._dropping(self._utf8.decode(b"".join(map(self._spelling.__getitem__, token_ids))))

    def flush(self) -> str:
        return self._dropping(self._utf8.decode(b"", final=True))

    def state(self) -> list[Any]:
        begun, _ = self._utf8.getstate()  # the first bytes of a character
        return [begun, self._drop_space]

    def restore(self, state: list[Any]) -> None:
        begun, drop_space = state
        if type(begun) is not bytes or len(begun) >= _MAX_CHARACTER_BYTES or type(drop_space) is not bool:
            raise ValueError("this is not the state of a decoder of bytes")
        self._drop_space = drop_space
        self._utf8.setstate((begun, 0))

    def _dropping(self, text: str) -> str:
        if self._drop_space and text:
            self._drop_space = False
            return text.removeprefix(" ")
        return text


class ByteSpelling:
    """Spells the tokens of a tokenizer in bytes. Its sequences share one instance, which looks up each token once."""

    def __init__(
        self,
        spell: Callable[[int], bytes],
        special_ids: Iterable[int],
        errors: str,
        drop_first_space: bool = False,
    ) -> None:
        self.spell = spell
        self._with_special = _Spelling(spell)
        self._without_special = _Spelling(spell, without_text=special_ids)
        self._errors = errors
        self._drop_first_space = drop_first_space

    def decoder(self, skip_special_tokens: bool) -> ByteDecoder:
        spelling = self._without_special if skip_special_tokens else self._with_special
        return ByteDecoder(spelling, self._errors, self._drop_first_space)


def spell_piece(piece: str) -> bytes:
    """Return the bytes of a token of a LLaMA-style vocabulary."""
    byte = _BYTE_TOKEN.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace(SPACE_MARK, " ").encode()


def byte_level_alphabet() -> dict[str, int]:
    """Map each character of byte-level BPE to its byte: printable bytes map to themselves, others to U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


class WindowDecoder:
    """Decodes incrementally for any tokenizer for which more tokens only extend the text.

    The window holds the tokens released last, as context (the text of a token may depend on the token before it), and
    the tokens whose text is held back.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._context_length = 0  # tokens of the window that have been released
        self._context_text = ""

    def begin(self, prompt_ids: Sequence[int]) -> None:
        """Keep the last tokens of the prompt as context: enough of them to have some text."""
        context: Sequence[int] = ()
        for size in _CONTEXT_SIZES:
            context = prompt_ids[-size:]
            if len(context) < size or self._decode(context).strip(REPLACEMENT_CHARACTER):
                break
        for token_id in context:
            self.push((token_id,))
        # The last token may hold whole characters before the one that it begins: these are the prompt's.
        self._context_text = self._decode(self._window).rstrip(REPLACEMENT_CHARACTER)

    def push(self, token_ids: Sequence[int]) -> str:
        self._window.extend(token_ids)
        text = self._decode(self._window)
        if text.endswith(REPLACEMENT_CHARACTER) or len(text) <= len(self._context_text):
            return ""
        new_text = text[len(self._context_text) :]
        del self._window[: self._context_length]
        self._context_length = len(self._window)
        self._context_text = self._decode(self._window)
        return new_text

    def flush(self) -> str:
        return self._decode(self._window)[len(self._context_text) :]

    def state(self) -> list[Any]:
        return [self._window, self._context_length, self._context_text]

    def restore(self, state: list[Any]) -> None:
        window, context_length, context_text = state
        if [type(window), type(context_length), type(context_text)] != [list, int, str]:
            raise ValueError("this is not the state of a decoder with a window")
        if any(type(token_id) is not int for token_id in window) or not 0 <= context_length <= len(window):
            raise ValueError("this is not the window of a decoder")
        self._window, self._context_length, self._context_text = list(window), context_length, context_text
