# SPDX-License-Identifier: Apache-2.0
"""Token ids to text as they come: whole characters only, at the cost of the new tokens.

Where each token has a fixed spelling in bytes (byte-level BPE as in BLOOM and LLaMA-3, byte-fallback vocabularies as in
LLaMA), an incremental UTF-8 decoder over those bytes is exact. For any other tokenizer a window of the last tokens is
decoded again at each push.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

REPLACEMENT_CHARACTER = "\ufffd"
# How sentencepiece spells a space.
SPACE_MARK = "\u2581"
_MOST_BYTES_OF_A_CHARACTER = 4
# How many of a prompt's last tokens are enough context; more only where none of these has text.
_CONTEXT_SIZES = (8, 64, 512)
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")

# Byte-fallback tokens that are not UTF-8 become one U+FFFD each, as sentencepiece has it; Python's own "replace"
# would make one of a whole truncated character.
ONE_PER_BYTE = "lightllm_backend.one_per_byte"


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return REPLACEMENT_CHARACTER * (error.end - error.start), error.end


codecs.register_error(ONE_PER_BYTE, _replace_each_byte)


class IncrementalDecoder(Protocol):
    """Token ids in, whole characters out; `flush` gives what was held back at the end.

    `begin` takes in the prompt that the sequence continues. `state` is plain data, as JSON has it, and short; a new
    decoder of the same tokenizer goes on from there after `restore`.
    """

    def begin(self, prompt_ids: Sequence[int]) -> None: ...

    def push(self, token_ids: Sequence[int]) -> str: ...

    def flush(self) -> str: ...

    def state(self) -> list[Any]: ...

    def restore(self, state: list[Any]) -> None: ...


class _Spelling(dict[int, bytes]):
    """The bytes of each token, worked out when it is first seen.

    A token without any is not kept: a prompt may hold any number of ids that no token has.
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
    """Incremental decoding for tokenizers whose tokens each have a spelling in bytes."""

    def __init__(self, spelling: _Spelling, errors: str, drop_first_space: bool) -> None:
        self._spelling = spelling
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors)
        self._drop_space = drop_first_space  # until there is some text

    def begin(self, prompt_ids: Sequence[int]) -> None:
        """At the cost of a few tokens: more bytes than a character has hold all that later text depends on."""
        end = b""
        for token_id in reversed(prompt_ids):
            end = self._spelling[token_id] + end
            if len(end) >= _MOST_BYTES_OF_A_CHARACTER:
                break
        self._dropping(self._utf8.decode(end))

    def push(self, token_ids: Sequence[int]) -> str:
        return self._dropping(self._utf8.decode(b"".join(map(self._spelling.__getitem__, token_ids))))

    def flush(self) -> str:
        return self._dropping(self._utf8.decode(b"", final=True))

    def state(self) -> list[Any]:
        begun, _ = self._utf8.getstate()  # the first bytes of a character
        return [list(begun), self._drop_space]

    def restore(self, state: list[Any]) -> None:
        begun, self._drop_space = state
        self._utf8.setstate((bytes(begun), 0))

    def _dropping(self, text: str) -> str:
        if self._drop_space and text:
            self._drop_space = False
            return text.removeprefix(" ")
        return text


class ByteSpelling:
    """How a tokenizer spells its tokens in bytes: one for all its sequences, so that each token is looked up once."""

    def __init__(
        self,
        spell: Callable[[int], bytes],
        special_ids: Iterable[int],
        errors: str,
        drop_first_space: bool = False,
    ) -> None:
        self._with_special = _Spelling(spell)
        self._without_special = _Spelling(spell, without_text=special_ids)
        self._errors = errors
        self._drop_first_space = drop_first_space

    def decoder(self, skip_special_tokens: bool) -> ByteDecoder:
        spelling = self._without_special if skip_special_tokens else self._with_special
        return ByteDecoder(spelling, self._errors, self._drop_first_space)


def spell_piece(piece: str) -> bytes:
    """The bytes of a token of a LLaMA-style vocabulary."""
    byte = _BYTE_TOKEN.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace(SPACE_MARK, " ").encode()


def byte_level_alphabet() -> dict[str, int]:
    """The characters that byte-level BPE writes bytes as: printable ones stand for themselves, others from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


class WindowDecoder:
    """Incremental decoding for any tokenizer whose text for some tokens begins with its text for fewer.

    The window is the tokens released last, for context (what a token's text is may depend on the one before it), and
    those whose text is held back.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._context_length = 0  # tokens of the window that have been released
        self._context_text = ""

    def begin(self, prompt_ids: Sequence[int]) -> None:
        """Keep the last tokens as context, as many as have some text."""
        context: Sequence[int] = ()
        for size in _CONTEXT_SIZES:
            context = prompt_ids[-size:]
            if len(context) < size or self._decode(context).strip(REPLACEMENT_CHARACTER):
                break
        for token_id in context:
            self.push((token_id,))

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
        window, self._context_length, self._context_text = state
        self._window = list(window)
