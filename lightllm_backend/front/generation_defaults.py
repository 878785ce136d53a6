# SPDX-License-Identifier: Apache-2.0
"""The defaults of sampling that a model brings in its generation_config.json. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightllm_backend.json_file import JsonFileError, read_json_object
from lightllm_backend.models.errors import ModelError
from lightllm_backend.option_table import OPTIONS
from lightllm_backend.options import show

_NAMES = ("do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def read_generation_defaults(directory: Path) -> dict[str, Any]:
    """Read the options that a model's requests have unless they name others; none without the file.

    Raise ModelError for a value that no request may have.
    """
    path = directory / "generation_config.json"
    try:
        values = read_json_object(path)
    except FileNotFoundError:
        return {}
    except JsonFileError as error:
        raise ModelError(f"{path}: {error}") from error
    return {name: _checked(path, name, values[name]) for name in _NAMES if values.get(name) is not None}


def _checked(path: Path, name: str, value: Any) -> Any:
    option = OPTIONS[name]
    try:
        converted = option.convert(value)
        if option.holds(converted):
            return converted
    except (ValueError, TypeError, OverflowError):
        pass
    raise ModelError(
        f"{path}: {name} is {show(value)}; allowed: {option.allowed}; or set generation_config to none to ignore it"
    )
