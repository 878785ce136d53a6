# SPDX-License-Identifier: Apache-2.0
"""Reads the JSON files that lie beside tokenizer.json or tokenizer.model. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lightllm_backend.json_file import JsonFileError, read_json_object
from lightllm_backend.text.added_tokens import AddedToken

# The largest vocabularies have 262,144 tokens; a greater id would make a table that fills the memory.
MAX_TOKEN_ID = 2**22
_MORE_SPECIAL_TOKENS = ("additional_special_tokens", "extra_special_tokens")


class TokenizerError(ValueError):
    """The tokenizer cannot be loaded or cannot encode a text."""


class TokenizerSettings(NamedTuple):
    """The tokenizer settings of one model directory."""

    values: Mapping[str, Any]
    added_tokens: Mapping[int, AddedToken]  # added tokens with an id, by id
    special_tokens: Mapping[str, AddedToken]  # tokens that the settings call special, by spelling

    @staticmethod
    def read(directory: Path) -> TokenizerSettings:
        config = _read_if_present(directory / "tokenizer_config.json")
        special_map = _read_if_present(directory / "special_tokens_map.json")
        # As in transformers, special_tokens_map.json wins only over a configuration without added_tokens_decoder.
        values = {**special_map, **config} if "added_tokens_decoder" in config else {**config, **special_map}
        added = {}
        try:
            special = {token.content: token for token in _special_tokens(values)}
            for content, token_id in _read_if_present(directory / "added_tokens.json").items():
                added[_token_id(token_id)] = AddedToken(content, content in special, normalized=content not in special)
            for token_id, token in values.get("added_tokens_decoder", {}).items():
                added[_token_id(token_id)] = AddedToken.from_json(token, bool(token.get("special", False)))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise TokenizerError(f"the added tokens of {directory} are malformed: {error!r}") from error
        return TokenizerSettings(values, added, special)

    @property
    def has_own_code(self) -> bool:
        auto_map = self.values.get("auto_map")
        return isinstance(auto_map, (Mapping, list, str)) and "AutoTokenizer" in auto_map


def _token_id(value: Any) -> int:
    if isinstance(value, float) and not value.is_integer():  # infinity and NaN, too
        raise ValueError(f"the id {value}; allowed: integers")
    token_id = int(value)
    if not 0 <= token_id <= MAX_TOKEN_ID:
        raise ValueError(f"the id {token_id}; allowed: 0 ≤ id ≤ {MAX_TOKEN_ID}")
    return token_id


def _special_tokens(values: Mapping[str, Any]) -> Iterator[AddedToken]:
    """Yield the named special tokens (bos_token, image_token, any *_token), then the nameless ones."""
    named: list[Any] = [token for name, token in values.items() if name.endswith("_token")]
    for name in _MORE_SPECIAL_TOKENS:
        more = values.get(name) or []
        named.extend(more.values() if isinstance(more, Mapping) else more)
    for token in named:
        fields = token if isinstance(token, Mapping) else {"content": token}
        if isinstance(fields.get("content"), str) and fields["content"]:
            yield AddedToken.from_json(fields, special=True)


def _read_if_present(path: Path) -> dict[str, Any]:
    """The JSON object of a file; an empty one if there is no file."""
    if not path.is_file():
        return {}
    try:
        return read_json_object(path)
    except JsonFileError as error:
        raise TokenizerError(f"{path} {error}") from error
