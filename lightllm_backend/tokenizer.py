# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of a model directory: text to token ids, and what decodes them again.

Nothing here imports torch, so the server's own processes can use it; transformers, which does, is the last resort.
"""

from __future__ import annotations

import json
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import sentencepiece
import tokenizers

from lightllm_backend.token_decoding import (
    ONE_PER_BYTE,
    SPACE_MARK,
    ByteSpelling,
    IncrementalDecoder,
    WindowDecoder,
    byte_level_alphabet,
    spell_piece,
)

TOKENIZER_MODES = ("auto", "slow")
_NOT_SPACE = re.compile(r"\S")
_NAMED_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class TokenizerError(ValueError):
    """A tokenizer cannot be loaded, or a text cannot be encoded."""


class Tokenizer(ABC):
    """What one model directory says about text; immutable, and safe to use from several threads."""

    vocab_size: int  # one more than the greatest id

    @staticmethod
    def load(model_dir: str | Path, mode: str = "auto", trust_remote_code: bool = False) -> Tokenizer:
        """Read tokenizer.json or, if it is alone or `mode` is "slow", the sentencepiece model tokenizer.model.

        transformers (and with it torch) is imported only where nothing else will do: for a tokenizer that brings its
        own code, with `trust_remote_code`, and in mode "slow" for a directory with neither file.
        """
        if mode not in TOKENIZER_MODES:
            raise TokenizerError(f"tokenizer_mode is {mode!r}; allowed: {' or '.join(TOKENIZER_MODES)}")
        directory = Path(model_dir)
        if not directory.is_dir():
            raise TokenizerError(f"{directory} is not a directory; a tokenizer is read from a model directory")
        settings = _TokenizerSettings.read(directory)
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

    def encode(self, text: str, parse_special: bool = True) -> list[int]:
        """The ids of a text, with BOS and EOS where the model wants them.

        With `parse_special` false the spelling of a special token in the text is plain text.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(f"the text has a lone surrogate at character {error.start}") from error
        return self._encode(text, parse_special)

    @abstractmethod
    def _encode(self, text: str, parse_special: bool) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of the ids; ids that the tokenizer does not know are no text.

        As transformers has it, but for one case in which this keeps more: of consecutive byte-fallback tokens that
        are not UTF-8 as a whole, only the broken ones become U+FFFD (as in sentencepiece), so that a newline, which
        is such a token in LLaMA, need not be held back until the next token.
        """
        decoder = self.incremental_decoder(skip_special_tokens)
        return decoder.push(token_ids) + decoder.flush()

    @abstractmethod
    def incremental_decoder(self, skip_special_tokens: bool = True) -> IncrementalDecoder:
        """A decoder for one sequence; what it gives, joined, is `decode` of all the ids."""


class _AddedToken(NamedTuple):
    content: str
    special: bool
    lstrip: bool = False  # it swallows the white space before it
    rstrip: bool = False


class _TokenizerSettings(NamedTuple):
    """What the JSON files beside tokenizer.json or tokenizer.model say."""

    values: Mapping[str, Any]
    # What has a fixed id, by that id.
    added_tokens: Mapping[int, _AddedToken]

    @staticmethod
    def read(directory: Path) -> _TokenizerSettings:
        values = {
            **_read_json_object(directory / "special_tokens_map.json"),
            **_read_json_object(directory / "tokenizer_config.json"),
        }
        added = {}
        try:
            for content, token_id in _read_json_object(directory / "added_tokens.json").items():
                added[int(token_id)] = _AddedToken(content, special=False)
            for token_id, token in values.get("added_tokens_decoder", {}).items():
                flags = (bool(token.get(flag, False)) for flag in ("special", "lstrip", "rstrip"))
                added[int(token_id)] = _AddedToken(token["content"], *flags)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise TokenizerError(f"the added tokens of {directory} are malformed: {error!r}") from error
        return _TokenizerSettings(values, added)

    @property
    def has_own_code(self) -> bool:
        return "AutoTokenizer" in (self.values.get("auto_map") or {})

    @property
    def special_contents(self) -> list[str]:
        """The spelling of each token that the settings name as special."""
        named: list[Any] = [self.values.get(name) for name in _NAMED_SPECIAL_TOKENS]
        for name in ("additional_special_tokens", "extra_special_tokens"):
            more = self.values.get(name) or []
            named.extend(more.values() if isinstance(more, Mapping) else more)
        contents = (token.get("content") if isinstance(token, Mapping) else token for token in named)
        return [content for content in contents if isinstance(content, str) and content]


def _read_json_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} is not a JSON object")
    return value


class _JsonTokenizer(Tokenizer):
    """tokenizer.json, through the tokenizers library; whether BOS is added is for the file to say."""

    def __init__(self, path: Path, settings: _TokenizerSettings) -> None:
        try:
            # The library is given the content: it takes no path that is spelled as inside a stub (see triton_io).
            self._inner = tokenizers.Tokenizer.from_buffer(path.read_bytes())
        except Exception as error:  # the library raises nothing narrower
            raise TokenizerError(f"{path} cannot be read: {error}") from error
        # A file may have been saved with limits of its training; a prompt is neither cut nor filled up.
        self._inner.no_truncation()
        self._inner.no_padding()
        self._add_tokens(settings)
        self._special_ids = frozenset(
            token_id for token_id, token in self._inner.get_added_tokens_decoder().items() if token.special
        )
        # Whether special tokens are parsed is a state of the inner tokenizer, which this lock guards.
        self._encoding = threading.Lock()
        self._spelling = self._byte_spelling()
        self.vocab_size = max(self._inner.get_vocab().values(), default=-1) + 1

    def _add_tokens(self, settings: _TokenizerSettings) -> None:
        """Take over tokens that only the settings beside the file name, or name as special."""
        for _, token in sorted(settings.added_tokens.items()):
            if self._inner.token_to_id(token.content) is None:
                added = tokenizers.AddedToken(
                    token.content, lstrip=token.lstrip, rstrip=token.rstrip, normalized=False, special=token.special
                )
                self._inner.add_tokens([added])
        known = {token.content for token in self._inner.get_added_tokens_decoder().values() if token.special}
        # One that is not in the vocabulary has no embedding either: its id would be past the model's.
        self._inner.add_special_tokens(
            [
                tokenizers.AddedToken(content, normalized=False, special=True)
                for content in settings.special_contents
                if content not in known and self._inner.token_to_id(content) is not None
            ]
        )

    def _byte_spelling(self) -> ByteSpelling | None:
        """The tokens' spelling, if the file's decoder is one that has it."""
        inner = self._inner
        decoder = json.loads(inner.decoder.__getstate__()) if inner.decoder else {}
        steps = decoder.get("decoders", [decoder])
        kinds = [step.get("type") for step in steps]
        if kinds == ["ByteLevel"]:
            alphabet = byte_level_alphabet()

            def spell_byte_level(token_id: int) -> bytes:
                token = inner.id_to_token(token_id) or ""
                # Added tokens are not written in this alphabet; one that could be is read in it all the same.
                return bytes(map(alphabet.__getitem__, token)) if alphabet.keys() >= set(token) else token.encode()

            return ByteSpelling(spell_byte_level, self._special_ids.__contains__, "replace")
        fallback_steps: list[dict[str, Any]] = [
            {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ]
        strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
        if steps in (fallback_steps, [*fallback_steps, strip]):
            return ByteSpelling(
                lambda token_id: spell_piece(inner.id_to_token(token_id) or ""),
                self._special_ids.__contains__,
                ONE_PER_BYTE,
                drop_first_space=strip in steps,
            )
        return None

    def _encode(self, text: str, parse_special: bool) -> list[int]:
        with self._encoding:
            self._inner.encode_special_tokens = not parse_special
            return self._inner.encode(text).ids

    def incremental_decoder(self, skip_special_tokens: bool = True) -> IncrementalDecoder:
        if self._spelling is not None:
            return self._spelling.decoder(skip_special_tokens)
        return WindowDecoder(lambda token_ids: self._inner.decode(token_ids, skip_special_tokens=skip_special_tokens))


class _SentencePieceTokenizer(Tokenizer):
    """tokenizer.model, through sentencepiece, with the tokens that Hugging Face's files add to it."""

    def __init__(self, path: Path, settings: _TokenizerSettings) -> None:
        try:
            self._inner = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
        except (OSError, RuntimeError) as error:
            raise TokenizerError(f"{path} is not a sentencepiece model: {error}") from error
        # Protocol buffers merge what is appended: this says normalizer_spec { add_dummy_prefix: false }.
        model = self._inner.serialized_model_proto() + b"\x1a\x02\x18\x00"
        self._without_prefix = sentencepiece.SentencePieceProcessor(model_proto=model)
        self._prefix_after_special = bool(settings.values.get("legacy", False))
        self._added = self._added_tokens(settings)
        self._ids = {token.content: token_id for token_id, token in self._added.items()}
        self._any_added = _any_of(token.content for token in self._added.values())
        self._plain_added = _any_of(token.content for token in self._added.values() if not token.special)
        self._head = self._edge("bos", settings.values.get("add_bos_token", True))
        self._tail = self._edge("eos", settings.values.get("add_eos_token", False))
        special_ids = frozenset(token_id for token_id, token in self._added.items() if token.special)
        self._spelling = ByteSpelling(
            self._spell,
            special_ids.__contains__,
            ONE_PER_BYTE,
            drop_first_space=self._inner.normalize("x").startswith(SPACE_MARK),
        )
        self.vocab_size = max(self._inner.get_piece_size(), max(self._added, default=-1) + 1)

    def _added_tokens(self, settings: _TokenizerSettings) -> dict[int, _AddedToken]:
        """What is split off before sentencepiece sees the text, by id."""
        inner = self._inner
        added = {
            token_id: _AddedToken(inner.id_to_piece(token_id), special=True)
            for token_id in range(inner.get_piece_size())
            if inner.is_control(token_id) or inner.is_unknown(token_id)
        }
        added |= settings.added_tokens
        special = set(settings.special_contents)
        return {
            token_id: token._replace(special=token.special or token.content in special)
            for token_id, token in added.items()
            if token.content
        }

    def _edge(self, name: str, wanted: bool) -> list[int]:
        token_id: int = getattr(self._inner, f"{name}_id")()
        return [token_id] if wanted and token_id >= 0 else []

    def _spell(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].content.encode()
        if not 0 <= token_id < self._inner.get_piece_size():
            return b""
        return spell_piece(self._inner.id_to_piece(token_id))

    def _encode(self, text: str, parse_special: bool) -> list[int]:
        ids = list(self._head)
        position = 0
        for match in (self._any_added if parse_special else self._plain_added).finditer(text):
            token_id = self._ids[match[0]]
            before = text[position : match.start()]
            ids += self._encode_part(before.rstrip() if self._added[token_id].lstrip else before, position)
            ids.append(token_id)
            position = match.end()
            if self._added[token_id].rstrip:
                following = _NOT_SPACE.search(text, position)
                position = following.start() if following else len(text)
        return ids + self._encode_part(text[position:], position) + self._tail

    def _encode_part(self, text: str, position: int) -> list[int]:
        """The ids of what lies between two added tokens; only what begins the text has the dummy prefix."""
        processor = self._inner if position == 0 or self._prefix_after_special else self._without_prefix
        ids: list[int] = processor.encode(text)
        return ids

    def incremental_decoder(self, skip_special_tokens: bool = True) -> IncrementalDecoder:
        return self._spelling.decoder(skip_special_tokens)


def _any_of(contents: Iterable[str]) -> re.Pattern[str]:
    """Matches the longest of some strings; without any, nothing."""
    return re.compile("|".join(map(re.escape, sorted(contents, key=len, reverse=True))) or r"(?!)")


class _TransformersTokenizer(Tokenizer):
    """Whatever transformers makes of a directory: the last resort, since it imports torch."""

    def __init__(self, directory: Path, trust_remote_code: bool) -> None:
        from transformers import AutoTokenizer  # here, since it imports torch

        try:
            self._inner = AutoTokenizer.from_pretrained(
                directory, use_fast=False, trust_remote_code=trust_remote_code, local_files_only=True
            )
        except (OSError, ValueError, ImportError, KeyError) as error:
            raise TokenizerError(f"{directory} has no tokenizer that transformers can load: {error}") from error
        self.vocab_size = max(self._inner.get_vocab().values(), default=-1) + 1

    def _encode(self, text: str, parse_special: bool) -> list[int]:
        return list(self._inner(text, split_special_tokens=not parse_special).input_ids)

    def incremental_decoder(self, skip_special_tokens: bool = True) -> IncrementalDecoder:
        def decode(token_ids: Sequence[int]) -> str:
            text = self._inner.decode(
                list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )
            return str(text)

        return WindowDecoder(decode)
