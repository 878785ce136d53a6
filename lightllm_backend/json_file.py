# SPDX-License-Identifier: Apache-2.0
"""Reads files that hold one JSON object. Standard library only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class JsonFileError(ValueError):
    """A file does not hold a JSON object. The message goes on after the file's path."""


def read_json_object(path: Path) -> dict[str, Any]:
    """Read the JSON object of a file; JsonFileError if the file holds none, FileNotFoundError if there is no file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise JsonFileError(f"cannot be read: {error}") from error
    except RecursionError as error:
        raise JsonFileError("is not valid JSON: it is nested too deeply") from error
    except ValueError as error:
        raise JsonFileError(f"is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise JsonFileError(f"holds a JSON {type(value).__name__}; an object is needed")
    return value
