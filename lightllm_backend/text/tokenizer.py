# SPDX-License-Identifier: Apache-2.0
"""Loads the tokenizer of a model directory, encodes texts and makes incremental decoders.

The server's own processes use this module, so it imports no torch; transformers, which does, is the last resort.
"""

from __future__ import annotations

import json
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from lightllm_backend.config import TOKENIZER_MODES
from lightllm_backend.text.added_tokens import AddedToken, AddedTokenSplitter, any_of
from lightllm_backend.text.incremental_decoding import (
    ONE_PER_BYTE,
    SPACE_MARK,
    ByteSpelling,
    IncrementalDecoder,
    WindowDecoder,
    byte_level_alphabet,
    spell_piece,
)
from lightllm_backend.text.token_bytes import TokenBytes, sentencepiece_token_bytes, token_bytes
from lightllm_backend.text.tokenizer_settings import TokenizerError, TokenizerSettings

LONG_TEXT = 1024  # characters; encoding fewer takes less than half a millisecond


class Tokenizer(ABC):
    """Encodes and decodes text for one model directory. Immutable and thread-safe."""

    vocab_size: int  # one more than the greatest id
    token_bytes: TokenBytes | None = None  # how much text a token stands for; None: no limit is known
    tokens_past_model: Mapping[int, str] = {}  # tokens without an embedding in the model; see `load`
    _spelling: ByteSpelling | None  # None: tokens have no fixed bytes
    _special_ids: Mapping[str, int]  # the id of each special token, by its spelling
    _all_special: frozenset[int]
    _any_special: re.Pattern[str]

    @staticmethod
    def load(
        model_dir: str | Path, mode: str = "auto", trust_remote_code: bool = False, model_vocab_size: int | None = None
    ) -> Tokenizer:
        """Read tokenizer.json or, if it is alone or `mode` is "slow", the sentencepiece model tokenizer.model.

        Import transformers, and with it torch, in two cases only: for a tokenizer that brings its own code, with
        `trust_remote_code`, and in mode "slow" for a directory with neither file. The tokenizer decodes ids from
        `model_vocab_size` on, but refuses a text that contains one.
        """
        tokenizer = _load(Path(model_dir), mode, trust_remote_code)
        if model_vocab_size is not None:
            past_model = {
                token_id: tokenizer.token(token_id) for token_id in range(model_vocab_size, tokenizer.vocab_size)
            }
            tokenizer.tokens_past_model = {token_id: token for token_id, token in past_model.items() if token}
        return tokenizer

    def encode(self, text: str, parse_special: bool = True, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of a text, with BOS and EOS if the model's files ask for them.

        If `add_special_tokens` is false, it gets neither. If `parse_special` is false, the spelling of a special token
        counts as plain text.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            place = f"a lone surrogate at character {error.start}"
            raise TokenizerError(f"the text has {place}; allowed: text that UTF-8 holds") from error
        token_ids = self._encode(text, parse_special, add_special_tokens)
        if self.tokens_past_model:
            self._check_model_has(token_ids)
        return token_ids

    @abstractmethod
    def _encode(self, text: str, parse_special: bool, add_special_tokens: bool) -> list[int]: ...

    @abstractmethod
    def token(self, token_id: int) -> str:
        """Return the vocabulary's spelling of a token; empty for an unknown id."""

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of the ids; unknown ids give no text.

        The text is that of transformers, with one exception: in a run of byte-fallback tokens that is not valid UTF-8,
        only the invalid ones become U+FFFD, as in sentencepiece. So a newline, a byte-fallback token in LLaMA, need
        not wait for the next token.
        """
        decoder = self.incremental_decoder(skip_special_tokens)
        return decoder.push(token_ids) + decoder.flush()

    def decode_prompt(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of a prompt without an incomplete character at its end.

        The text from `incremental_decoder(skip_special_tokens, token_ids)` continues it.
        """
        begun = self.incremental_decoder(skip_special_tokens, token_ids).flush()
        return self.decode(token_ids, skip_special_tokens).removesuffix(begun)

    def incremental_decoder(
        self, skip_special_tokens: bool = True, prompt_ids: Sequence[int] = ()
    ) -> IncrementalDecoder:
        """Make a decoder for one sequence that continues a prompt.

        The text of the prompt and the decoder's output, joined, are the text of prompt and sequence together: a first
        word keeps its space unless the prompt has no text.
        """
        decoder = self._decoder(skip_special_tokens)
        if len(prompt_ids) > 0:
            decoder.begin(prompt_ids)
        return decoder

    @abstractmethod
    def _decoder(self, skip_special_tokens: bool) -> IncrementalDecoder: ...

    @property
    def has_fixed_bytes(self) -> bool:
        """Whether each token stands for the same bytes everywhere."""
        return self._spelling is not None

    def spellings(self) -> list[bytes] | None:
        """Return the bytes of each token, of special ones too, by id; None if tokens have no fixed bytes."""
        spelling = self._spelling
        return None if spelling is None else [spelling.spell(token_id) for token_id in range(self.vocab_size)]

    def definition(self) -> str | None:
        """Return the tokenizer in the format of tokenizer.json, if it is one of the tokenizers library."""
        return None

    def encode_continuation(self, text: str) -> list[int]:
        """Return the ids of a text that follows another: no BOS goes before, and no space is added."""
        raise NotImplementedError

    @property
    def special_ids(self) -> list[int]:
        """The ids of the special tokens."""
        return sorted(self._special_ids.values())

    def is_special(self, token_id: int) -> bool:
        return token_id in self._all_special

    def spells_special(self, text: str) -> bool:
        """Whether a text contains the spelling of a special token."""
        return self._any_special.search(text) is not None

    def split_special(self, text: str) -> list[str | int]:
        """Split a text at the special tokens that it spells, into their ids and the text between them."""
        pieces, position = list[str | int](), 0
        for match in self._any_special.finditer(text):
            pieces += [text[position : match.start()], self._special_ids[match[0]]]
            position = match.end()
        return [*pieces, text[position:]]

    def _set_special(self, special_tokens: Mapping[int, str]) -> None:
        self._special_ids = {spelling: token_id for token_id, spelling in special_tokens.items() if spelling}
        self._all_special = frozenset(self._special_ids.values())
        self._any_special = any_of(self._special_ids)

    def _check_model_has(self, token_ids: Iterable[int]) -> None:
        for token_id in token_ids:
            if token_id in self.tokens_past_model:
                raise TokenizerError(
                    f"{self.tokens_past_model[token_id]!r} is the token {token_id}, which the model does not have; "
                    f"allowed: text whose tokens have ids below {min(self.tokens_past_model)}"
                )


def _load(directory: Path, mode: str, trust_remote_code: bool) -> Tokenizer:
    if mode not in TOKENIZER_MODES:
        raise TokenizerError(f"tokenizer_mode is {mode!r}; allowed: {' or '.join(TOKENIZER_MODES)}")
    if not directory.is_dir():
        raise TokenizerError(f"{directory} is not a directory; a tokenizer is read from a model directory")
    settings = TokenizerSettings.read(directory)
    fast, slow = directory / "tokenizer.json", directory / "tokenizer.model"
    if trust_remote_code and settings.has_own_code:
        return _TransformersTokenizer(directory, trust_remote_code)
    if slow.is_file() and (mode == "slow" or not fast.is_file()):
        return _SentencePieceTokenizer(slow, settings)
    if fast.is_file():
        return _JsonTokenizer(fast, settings)
    if settings.has_own_code and not trust_remote_code:
        raise TokenizerError(
            f"{directory} has a tokenizer that is code of its own (auto_map in tokenizer_config.json), and "
            "trust_remote_code is false; set it to true if you trust that code"
        )
    if mode == "slow" or trust_remote_code:
        return _TransformersTokenizer(directory, trust_remote_code)
    raise TokenizerError(
        f"{directory} has no tokenizer: tokenizer.json or tokenizer.model (sentencepiece) is needed; "
        "other kinds can be loaded with tokenizer_mode slow"
    )


class _JsonTokenizer(Tokenizer):
    """Uses tokenizer.json through the tokenizers library; the file decides whether to add BOS."""

    def __init__(self, path: Path, settings: TokenizerSettings) -> None:
        try:
            # Pass the content: the library cannot open a path as spelled inside a stub (see engine_config).
            self._inner = tokenizers.Tokenizer.from_buffer(path.read_bytes())
        except Exception as error:  # the library raises nothing narrower
            raise TokenizerError(f"{path} cannot be read: {error}") from error
        # The file may hold truncation and padding of its training; a prompt gets neither.
        self._inner.no_truncation()
        self._inner.no_padding()
        self._add_tokens(settings)
        added = self._inner.get_added_tokens_decoder().items()
        self._set_special({token_id: token.content for token_id, token in added if token.special})
        self.vocab_size = max(self._inner.get_vocab().values(), default=-1) + 1
        self.token_bytes = token_bytes(self._inner)
        self._copying = threading.Lock()  # guards the copy's making
        self._copy: tokenizers.Tokenizer | None = None
        self._spelling = self._byte_spelling()

    def _add_tokens(self, settings: TokenizerSettings) -> None:
        """Add the tokens of the settings, whose flags win over the file's; a token is special if either says so."""
        known = self._inner.get_added_tokens_decoder().values()
        special_in_file = {token.content for token in known if token.special}
        self._inner.add_tokens(
            [
                _library_token(token._replace(special=token.special or token.content in special_in_file))
                for _, token in sorted(settings.added_tokens.items())
            ]
        )
        added = {token.content: token for token in self._inner.get_added_tokens_decoder().values()}
        special = []
        for content, token in settings.special_tokens.items():
            if content in added:
                added[content].special = True
                special.append(added[content])
            # A token outside the vocabulary has no embedding either: its id would be past the model's.
            elif self._inner.token_to_id(content) is not None:
                special.append(_library_token(token))
        self._inner.add_tokens(special)

    def definition(self) -> str:
        definition: str = self._inner.to_str()
        return definition

    def _byte_spelling(self) -> ByteSpelling | None:
        """Return the tokens' spelling in bytes, or None if the file's decoder has no fixed one."""
        decoder = json.loads(self._inner.decoder.__getstate__()) if self._inner.decoder else {}
        special_ids = self._special_ids.values()
        steps = decoder.get("decoders", [decoder])
        kinds = [step.get("type") for step in steps]
        if kinds == ["ByteLevel"]:
            alphabet = byte_level_alphabet()

            def spell_byte_level(token_id: int) -> bytes:
                token = self.token(token_id)
                # Added tokens are plain text; the decoder reads one in this alphabet if all its characters fit.
                return bytes(map(alphabet.__getitem__, token)) if alphabet.keys() >= set(token) else token.encode()

            return ByteSpelling(spell_byte_level, special_ids, "replace")
        fallback_steps: list[dict[str, Any]] = [
            {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ]
        strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
        if steps in (fallback_steps, [*fallback_steps, strip]):
            return ByteSpelling(
                lambda token_id: spell_piece(self.token(token_id)),
                special_ids,
                ONE_PER_BYTE,
                drop_first_space=strip in steps,
            )
        return None

    def _encode(self, text: str, parse_special: bool, add_special_tokens: bool) -> list[int]:
        inner = self._inner if parse_special else self._without_special
        if len(text) < LONG_TEXT:
            return inner.encode(text, add_special_tokens=add_special_tokens).ids
        [encoding] = inner.encode_batch_fast(
            [text], add_special_tokens=add_special_tokens
        )  # unlike `encode`, this releases the GIL
        return list(encoding.ids)

    @property
    def _without_special(self) -> tokenizers.Tokenizer:
        """A copy that takes the spelling of special tokens as text: a switch could not serve two threads at once."""
        with self._copying:
            if self._copy is None:
                copy = tokenizers.Tokenizer.from_str(self._inner.to_str())
                copy.encode_special_tokens = True
                self._copy = copy
            return self._copy

    def token(self, token_id: int) -> str:
        return (self._inner.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None) or ""

    def _decoder(self, skip_special_tokens: bool) -> IncrementalDecoder:
        if self._spelling is not None:
            return self._spelling.decoder(skip_special_tokens)

        def decode(token_ids: Sequence[int]) -> str:
            known = [token_id for token_id in token_ids if 0 <= token_id < self.vocab_size]
            return self._inner.decode(known, skip_special_tokens=skip_special_tokens)

        return WindowDecoder(decode)


def _library_token(token: AddedToken) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(**token._asdict())


class _SentencePieceTokenizer(Tokenizer):
    """Uses tokenizer.model through sentencepiece, with the tokens that Hugging Face's files add."""

    def __init__(self, path: Path, settings: TokenizerSettings) -> None:
        import sentencepiece  # here, since most models do without it

        try:
            self._inner = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
        except (OSError, RuntimeError) as error:
            raise TokenizerError(f"{path} is not a sentencepiece model: {error}") from error
        # Protocol buffers merge appended fields; these bytes are normalizer_spec { add_dummy_prefix: false }.
        model = self._inner.serialized_model_proto() + b"\x1a\x02\x18\x00"
        self._without_prefix = sentencepiece.SentencePieceProcessor(model_proto=model)
        self._prefix_after_special = bool(settings.values.get("legacy", False))
        self._added = self._added_tokens(settings)
        self._splitter = AddedTokenSplitter(self._added)
        self._head = self._edge("bos", settings.values.get("add_bos_token", True))
        self._tail = self._edge("eos", settings.values.get("add_eos_token", False))
        special = {token_id: token.content for token_id, token in self._added.items() if token.special}
        self._set_special(special)
        self._spelling = ByteSpelling(
            self._spell,
            special,
            ONE_PER_BYTE,
            drop_first_space=self._inner.normalize("x").startswith(SPACE_MARK),
        )
        self.vocab_size = max(self._inner.get_piece_size(), max(self._added, default=-1) + 1)
        self.token_bytes = sentencepiece_token_bytes(self._inner, self._added)

    def _added_tokens(self, settings: TokenizerSettings) -> dict[int, AddedToken]:
        """Return the tokens to split off before sentencepiece sees the text, by id."""
        inner = self._inner
        pieces = {inner.id_to_piece(token_id): token_id for token_id in range(inner.get_piece_size())}
        added = {
            token_id: AddedToken(piece, special=True, normalized=False)
            for piece, token_id in pieces.items()
            if inner.is_control(token_id) or inner.is_unknown(token_id)
        }
        for content, token in settings.special_tokens.items():
            if content in pieces:
                added[pieces[content]] = token
        added |= settings.added_tokens
        return {
            token_id: token._replace(special=token.special or token.content in settings.special_tokens)
            for token_id, token in added.items()
            if token.content
        }

    def _edge(self, name: str, wanted: bool) -> list[int]:
        token_id: int = getattr(self._inner, f"{name}_id")()
        return [token_id] if wanted and token_id >= 0 else []

    def token(self, token_id: int) -> str:
        if token_id in self._added:
            return self._added[token_id].content
        return self._inner.id_to_piece(token_id) if 0 <= token_id < self._inner.get_piece_size() else ""

    def encode_continuation(self, text: str) -> list[int]:
        return list(self._without_prefix.encode(text))

    def _spell(self, token_id: int) -> bytes:
        token = self.token(token_id)
        return token.encode() if token_id in self._added else spell_piece(token)

    def _encode(self, text: str, parse_special: bool, add_special_tokens: bool) -> list[int]:
        ids = list(self._head) if add_special_tokens else []
        for piece in self._splitter.split(text, parse_special):
            if isinstance(piece, int):
                ids.append(piece)
            else:
                # sentencepiece puts a space before the text; only the first piece gets it.
                with_prefix = piece.start == 0 or self._prefix_after_special
                ids += (self._inner if with_prefix else self._without_prefix).encode(piece.text)
        return ids + self._tail if add_special_tokens else ids

    def _decoder(self, skip_special_tokens: bool) -> IncrementalDecoder:
        assert self._spelling is not None, "set when the file was read"
        return self._spelling.decoder(skip_special_tokens)


class _TransformersTokenizer(Tokenizer):
    """Uses the tokenizer that transformers loads from a directory: the last resort, since it imports torch."""

    _spelling = None

    def __init__(self, directory: Path, trust_remote_code: bool) -> None:
        from transformers import AutoTokenizer  # here, since it imports torch

        try:
            self._inner = AutoTokenizer.from_pretrained(
                directory, use_fast=False, trust_remote_code=trust_remote_code, local_files_only=True
            )
        except (OSError, ValueError, ImportError, KeyError) as error:
            raise TokenizerError(f"{directory} has no tokenizer that transformers can load: {error}") from error
        vocabulary = self._inner.get_vocab()
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self._set_special({vocabulary[token]: token for token in self._inner.all_special_tokens if token in vocabulary})

    def _encode(self, text: str, parse_special: bool, add_special_tokens: bool) -> list[int]:
        encoded = self._inner(text, split_special_tokens=not parse_special, add_special_tokens=add_special_tokens)
        return list(encoded.input_ids)

    def token(self, token_id: int) -> str:
        return str(self._inner.convert_ids_to_tokens(token_id)) if 0 <= token_id < self.vocab_size else ""

    def _decoder(self, skip_special_tokens: bool) -> IncrementalDecoder:
        def decode(token_ids: Sequence[int]) -> str:
            known = [token_id for token_id in token_ids if 0 <= token_id < self.vocab_size]
            text = self._inner.decode(
                known, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )
            return str(text)

        return WindowDecoder(decode)
