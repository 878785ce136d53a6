# SPDX-License-Identifier: Apache-2.0
"""What the sections of the report are made of: a title that tells where a result comes from, and tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

Result = dict[str, Any]  # what a benchmark has stored as JSON, or a row of it


def section(title: str, source: str, *blocks: Sequence[str]) -> list[str]:
    """The lines of a section. source: what `origin` says; a block without lines is left out."""
    lines = [f"**{title}** ({source}):"]
    for block in filter(None, blocks):
        lines += ["", *block]
    return lines


def origin(result: Result) -> str:
    """The machine, the versions, the commit and the day of a result."""
    versions = result["versions"]
    machine = result["machine"]["gpu"] or f"{result['machine']['cpu']}, {result['machine']['cores']} cores"
    parts = [machine, *(f"{name} {versions[name]}" for name in ("torch", "triton") if versions[name])]
    return f"{', '.join(parts)}, commit {result['commit']}, {result['date'][:10]}"


def table(columns: Sequence[tuple[str, ...]], rows: Iterable[Result]) -> list[str]:
    """Each column is its heading and the layout of its cells, which `str.format` fills with a row's figures.

    A third string stands for a figure that a row lacks or that is None; without one, that is an error.
    """
    headings = [heading for heading, *_ in columns]
    return grid(headings, ([cell(row, *layout) for _, *layout in columns] for row in rows))


def cell(row: Result, layout: str, missing: str | None = None) -> str:
    try:
        return layout.format_map(row)
    except (KeyError, TypeError):  # None takes no format
        if missing is None:
            raise
        return missing


def grid(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The table of finished cells."""
    lines = [f"| {' | '.join(headings)} |", f"|{' --: |' * len(headings)}"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]
