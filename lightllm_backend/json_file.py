# SPDX-License-Identifier: Apache-2.0
"""Reads files that hold one JSON object. Standard library only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# JSON's names of what Python reads as these.
_TYPES = {list: "an array", str: "a string", bool: "true or false", type(None): "null"}


class JsonFileError(ValueError):
    """A file does not hold a JSON object. The message goes on after the file's path."""


def read_json_object(path: Path) -> dict[str, Any]:
    """Read the JSON object of a file; JsonFileError if the file holds none, FileNotFoundError if there is no file."""
    try:
        if path.exists() and not path.is_file():  # reading a pipe would wait for its writer
            raise JsonFileError("is not a file; a file with a JSON object is needed")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, JsonFileError):
        raise
    except OSError as error:
        raise JsonFileError(f"cannot be read: {error}") from error
    except RecursionError as error:
        raise JsonFileError("is not valid JSON: it is nested too deeply") from error
    except ValueError as error:
        raise JsonFileError(f"is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise JsonFileError(f"holds {_TYPES.get(type(value), 'a number')}; a JSON object is needed")
    return value
