# SPDX-License-Identifier: Apache-2.0
"""ConfigFields: values of a JSON file, taken by kind; one that is missing or wrong is a ModelError that names it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightllm_backend.models.errors import ModelError

_REQUIRED = object()


@dataclass(frozen=True)
class ConfigFields:
    """One JSON object whose values are taken by kind; an absent or null value takes the default, or is an error."""

    path: Path
    values: dict[str, Any]
    prefix: str = ""

    @classmethod
    def read(cls, path: Path) -> ConfigFields:
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ModelError(
                f"{path}: there is no such file; a Hugging Face model directory with one is needed"
            ) from error
        except OSError as error:
            raise ModelError(f"{path}: cannot be read: {error}") from error
        except ValueError as error:
            raise ModelError(f"{path}: is not valid JSON: {error}") from error
        if not isinstance(values, dict):
            raise ModelError(f"{path}: holds a JSON {type(values).__name__}; an object is needed")
        return cls(path, values)

    def error(self, key: str, needed: str) -> ModelError:
        is_there = self.values.get(key) is not None
        value = f"is {self.values[key]!r}" if is_there else "is missing"
        return ModelError(f"{self.path}: {self.prefix}{key} {value}; {needed}")

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def child(self, key: str) -> ConfigFields:
        """The object under `key`; an empty one if it is absent."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.error(key, "an object is needed")
        return ConfigFields(self.path, value or {}, f"{self.prefix}{key}.")

    def either(self, *keys: str) -> str:
        """The first of several names of one setting that is there; without any, the last."""
        return next((key for key in keys if self.has(key)), keys[-1])

    def count(self, key: str, default: object = _REQUIRED, least: int = 1) -> int:
        value = self.values.get(key)
        if value is None and default is not _REQUIRED:
            value = default
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise self.error(key, f"an integer of at least {least} is needed")
        return value

    def positive(self, key: str, default: object = _REQUIRED) -> float:
        value = self.values.get(key)
        if value is None and default is not _REQUIRED:
            value = default
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value) or value <= 0:
            raise self.error(key, "a number above 0 is needed")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, "true or false is needed")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        """A token id or a list of them."""
        value = self.values.get(key)
        ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
        if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in ids):
            raise self.error(key, "a token id or a list of token ids is needed")
        return ids
