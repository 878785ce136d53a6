# SPDX-License-Identifier: Apache-2.0
"""Writes the documentation's tables of settings, request options and metrics from the code that has them.

    python -m lightllm_backend.doc_tables

Each table is between a pair of comments of its page; the rest is written by hand and kept.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from lightllm_backend.config import EngineConfig
from lightllm_backend.option_table import OPTIONS, boolean
from lightllm_backend.request import DEFAULTS
from lightllm_backend.triton_server.metric_table import METRICS, PREFIX

DOCS = Path(__file__).parents[1] / "docs"
COMMAND = "python -m lightllm_backend.doc_tables"
_NAMES = {*OPTIONS, *EngineConfig.__dataclass_fields__}
_POWERS = {2**31 - 1: "2³¹−1", 2**64 - 1: "2⁶⁴−1"}


def updated(page: Path, text: str) -> str:
    """The text of a page with its tables made anew. ValueError if the text has no place for one."""
    for name, rows in TABLES[page].items():
        first, last = f"<!-- {name}: {COMMAND} -->", f"<!-- end of {name} -->"
        before, _, rest = text.partition(first)
        _, found, after = rest.partition(last)
        if not found:
            raise ValueError(f"{page.name} has no table between {first} and {last}")
        table = "".join("|" + "".join(f" {cell} |" if cell else " |" for cell in row) + "\n" for row in rows())
        text = f"{before}{first}\n\n{table}\n{last}{after}"
    return text


def _settings() -> Iterable[tuple[str, ...]]:
    yield "setting", "default", ""
    yield "---", "---", "---"
    for setting in fields(EngineConfig):
        choices = setting.metadata["allowed"].split(" | ") if setting.type in ("str", "bool | str") else []
        is_choice = len(choices) > 1
        yield (
            f"`{setting.name}`",
            _default(setting.default),
            _with_code(setting.metadata["help"]) + (f" ({', '.join(choices)})" if is_choice else ""),
        )


def _options() -> Iterable[tuple[str, ...]]:
    yield "input", "type", "default", "allowed", "", "also called"
    yield "---", "---", "---", "---", "---", "---"
    for name, option in OPTIONS.items():
        yield (
            f"`{name}`",
            "{} [{}]".format(*option.tensor) if option.tensor else "–",
            _default(DEFAULTS.get(name)),
            "" if option.convert is boolean else _with_code(_with_powers(option.allowed)),
            _with_code(option.help),
            ", ".join(f"`{other}`" for other in option.other_names),
        )
    yield (
        "`sampling_parameters`",
        "STRING [1]",
        "–",
        "a JSON object, at most 8 MiB and 16 levels deep",
        "Any of the above.",
        "",
    )


def _metrics() -> Iterable[tuple[str, ...]]:
    yield "metric", "kind", "labels", ""
    yield "---", "---", "---", "---"
    for name, metric in METRICS.items():
        labels = [
            f"`{label}`" + (f" ({', '.join(values)})" if values else "") for label, values in metric.labels.items()
        ]
        yield f"`{PREFIX}{name}`", metric.kind.lower(), ", ".join(labels) or "–", _with_code(metric.help)


def _default(value: Any) -> str:
    """A default as a user writes it; a dash if there is none, or the help names it."""
    if value in (None, (), ""):
        return "–"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _with_code(text: str) -> str:
    """The text with the names of options and settings, which have an underscore, marked as code; no names of files."""
    names = r"\b[a-z]+(_[a-z]+)+\b(?!\.json)"
    return re.sub(names, lambda word: f"`{word[0]}`" if word[0] in _NAMES else word[0], text)


def _with_powers(text: str) -> str:
    return re.sub(r"\d+", lambda number: _POWERS.get(int(number[0]), number[0]), text)


# The pages, and the tables of each.
TABLES: dict[Path, dict[str, Callable[[], Iterable[tuple[str, ...]]]]] = {
    DOCS / "settings.md": {"settings": _settings},
    DOCS / "request_options.md": {"options": _options},
    DOCS / "monitoring.md": {"metrics": _metrics},
}

if __name__ == "__main__":
    for page in TABLES:
        page.write_text(updated(page, page.read_text(encoding="utf-8")), encoding="utf-8")
