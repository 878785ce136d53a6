# SPDX-License-Identifier: Apache-2.0
"""The code blocks of the documentation: which are run here, and why others are not.

A block of a shell or of Python is run by tests/e2e/test_e2e_snippets.py, or has a comment right above it:

    <!-- run by tests/FILE.py::test_name -->    another test runs it
    <!-- not run: REASON -->

What a console shows below a command, or a block of text right below a block of Python, is the output; `…` stands for
anything in it.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from docs.site.hooks import PAGES

ROOT = Path(__file__).parents[2]
SHELLS = ("bash", "console", "sh", "shell")
LANGUAGES_THAT_RUN = (*SHELLS, "py", "pycon", "python")
# Commands that run beside a server without leaving anything.
PROGRAMS = ("curl", "lightllm")
FENCE = re.compile(
    r"(?:^<!-- (?P<way>run by|not run:) (?P<word>.+?) -->\n+)?"
    r"^(?P<indent> *)```(?P<language>[^\n`]*)\n(?P<text>.*?)^(?P=indent)```$"
    r"(?P<output>\n\n```text\n(?P<expected>.*?)^```$)?",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block. way: "run by" with the test, "not run:" with the reason, or nothing if it is run here."""

    page: str
    line: int
    language: str
    text: str
    way: str
    word: str
    expected: str | None

    @property
    def commands(self) -> list[tuple[str, str]]:
        """The commands of a shell's block, each with the output that is shown."""
        if self.language != "console":
            return [(self.text, "")]
        found: list[tuple[str, str]] = []
        for line in self.text.splitlines(keepends=True):
            if found and not found[-1][1] and not is_whole(found[-1][0]):
                found[-1] = (found[-1][0] + line, "")
            elif line.startswith("$ "):
                found.append((line[2:], ""))
            elif found:
                found[-1] = (found[-1][0], found[-1][1] + line)
        return found

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def is_whole(command: str) -> bool:
    """Whether a command does not go on in the next line."""
    if command.rstrip("\n").endswith("\\"):
        return False
    try:
        shlex.split(command, comments=True)
    except ValueError:
        return False
    return True


def pages() -> list[str]:
    """The pages of the site, by their place in the repository."""
    return sorted([*PAGES, *(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))])


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [
        Block(
            page,
            text.count("\n", 0, found.start("indent")) + 1,
            found["language"].strip(),
            found["text"],
            found["way"] or "",
            found["word"] or "",
            found["expected"],
        )
        for found in FENCE.finditer(text)
    ]


def to_run(page: str) -> list[Block]:
    """The blocks of a page that are run here."""
    return [block for block in blocks(page) if block.language in LANGUAGES_THAT_RUN and not block.way]


def matches(output: str, expected: str) -> bool:
    """Whether an output is the one that the page shows."""
    pattern = re.escape(expected.strip("\n")).replace("…", ".*")
    return re.fullmatch(pattern, output.strip("\n"), re.DOTALL) is not None
