# SPDX-License-Identifier: Apache-2.0
"""ConfigFields: typed access to the values of a JSON file. A ModelError names the key of a missing or wrong value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lightllm_backend.json_file import JsonFileError, read_json_object
from lightllm_backend.models.errors import ModelError

_REQUIRED = object()
# Sizes are 32-bit integers to the kernels.
MAX_COUNT = 2**31 - 1
# Characters of a value that an error repeats.
_MAX_VALUE = 1000


@dataclass(frozen=True)
class ConfigFields:
    """One JSON object, read by type.

    An absent key takes its value from `defaults`. Null, from the file or from `defaults`, is an error unless the caller
    says what it stands for.
    """

    path: Path
    values: Mapping[str, Any]
    prefix: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> ConfigFields:
        """Read the JSON object of a file."""
        try:
            values = read_json_object(path)
        except FileNotFoundError as error:
            raise ModelError(
                f"{path}: there is no such file; a Hugging Face model directory with one is needed"
            ) from error
        except JsonFileError as error:
            raise ModelError(f"{path}: {error}") from error
        return cls(path, values)

    def with_defaults(self, defaults: Mapping[str, Any]) -> ConfigFields:
        """The same values with other defaults."""
        return replace(self, defaults=defaults)

    def error(self, key: str, needed: str) -> ModelError:
        """The error for a key's value: path, key, value and what is needed."""
        if key in self.values:
            text = "null" if self.values[key] is None else repr(self.values[key])
            value = f"is {text if len(text) <= _MAX_VALUE else text[:_MAX_VALUE] + '…'}"
        else:
            default = self.defaults.get(key)
            value = "is missing" if default is None else f"is missing, which makes it {default!r}"
        return ModelError(f"{self.place(key)} {value}; {needed}")

    def place(self, key: str) -> str:
        """The path and the key, for errors."""
        # A key of someone else's file may hold what no encoding has.
        name = f"{self.prefix}{key}".encode(errors="backslashreplace").decode()
        return f"{self.path}: {name}"

    def knows(self, key: str) -> bool:
        """Whether transformers' class has this key."""
        return key in self.defaults

    def get(self, key: str) -> Any:
        """The value or its default, of any type."""
        return self.values.get(key, self.defaults.get(key))

    def has(self, key: str) -> bool:
        """Whether the value or its default is not null."""
        return self.get(key) is not None

    def child(self, key: str) -> ConfigFields:
        """The object under `key`, or an empty one if the key is absent or null."""
        value = self.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.error(key, "an object is needed")
        return ConfigFields(self.path, value or {}, f"{self.prefix}{key}.")

    def either(self, *keys: str) -> str:
        """The first of several names of one setting that has a value, or else the last."""
        return next((key for key in keys if self.has(key)), keys[-1])

    def count(self, key: str, null: object = _REQUIRED, least: int = 1, most: int = MAX_COUNT) -> int:
        """An integer from `least` to `most`; null counts as `null`."""
        value = self.get(key)
        if value is None and null is not _REQUIRED:
            value = null
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise self.error(key, f"an integer of at least {least} is needed")
        if value > most:
            raise self.error(key, f"an integer of at most {most} is needed")
        return value

    def positive(self, key: str) -> float:
        """A number above 0."""
        value = self.get(key)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
            raise self.error(key, "a number above 0 is needed")
        try:
            return float(value)
        except OverflowError:
            raise self.error(key, "a smaller number is needed") from None

    def positives(self, key: str, length: int) -> tuple[float, ...]:
        """A list of `length` numbers above 0."""
        value = self.get(key)
        if not isinstance(value, list) or len(value) != length:
            raise self.error(key, f"a list of {length} numbers above 0 is needed")
        items = ConfigFields(self.path, {str(index): item for index, item in enumerate(value)}, f"{self.prefix}{key}.")
        return tuple(items.positive(name) for name in items.values)

    def flag(self, key: str) -> bool:
        """True or false; false for a key that the class does not have."""
        value = self.get(key) if self.knows(key) else False
        if not isinstance(value, bool):
            raise self.error(key, "true or false is needed")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        """A token id or a list of them."""
        value = self.get(key)
        ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
        if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in ids):
            raise self.error(key, "a token id or a list of token ids is needed")
        return ids
