# SPDX-License-Identifier: Apache-2.0
"""Reads JSON that a client has sent, within limits. Standard library only."""

from __future__ import annotations

import json
from typing import Any

# Room for a prompt of 1 MiB, each byte of which is written as \u00XX. A longer one has a tensor of its own.
MAX_JSON_BYTES = 8 * 2**20
MAX_JSON_DEPTH = 64  # a JSON Schema takes two levels for each one of the documents that it describes


class NotExact(ValueError):
    """The type cannot hold the value. The message goes on after the value and gives the reason."""


def parse_json(text: str) -> Any:
    """Parse a client's JSON; raise ValueError with the reason if it is none, too long or too deeply nested."""
    size = len(text.encode(errors="surrogatepass"))
    if size > MAX_JSON_BYTES:
        raise NotExact(f"which has {size} bytes, more than the {MAX_JSON_BYTES} of any JSON")
    too_deep = NotExact(f"which is nested more than {MAX_JSON_DEPTH} levels deep")
    try:
        parsed = json.loads(text)
    except RecursionError:
        raise too_deep from None
    except json.JSONDecodeError:
        raise
    except ValueError:  # Python's own limit, and its message is for programmers
        raise NotExact("which holds an integer of thousands of digits") from None
    if is_deeper(parsed, MAX_JSON_DEPTH):
        raise too_deep
    return parsed


def is_deeper(value: Any, levels: int) -> bool:
    """Whether more objects and lists are nested in each other than so many."""
    level = [value]
    for _ in range(levels + 1):
        containers = [one for one in level if isinstance(one, (dict, list))]
        if not containers:
            return False
        level = [item for one in containers for item in (one.values() if isinstance(one, dict) else one)]
    return True
