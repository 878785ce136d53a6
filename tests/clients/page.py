# SPDX-License-Identifier: Apache-2.0
"""Runs what docs/clients.md shows, in the environments of the clients."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tests.clients.environments import FOLDER, EnvironmentMissing, environment

PAGE = (Path(__file__).parents[2] / "docs" / "clients.md").read_text(encoding="utf-8")
LIMIT_SECONDS = 500
# No lists of prices and no models from elsewhere, and no proxy before the server.
SETTINGS = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "HF_HUB_OFFLINE": "1", "NO_PROXY": "127.0.0.1"}


def programs_of(name: str) -> Path:
    """An environment's programs. Without it the test is skipped; in CI, where nothing may be missing, it fails."""
    try:
        return environment(name)
    except EnvironmentMissing as missing:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(missing))


def requirements(name: str) -> dict[str, str]:
    """The packages that NAME.in asks for, and their versions."""
    return dict(re.findall(r"^([\w-]+)(?:\[\w+\])?==(\S+)$", (FOLDER / f"{name}.in").read_text(), flags=re.MULTILINE))


def rows() -> list[list[str]]:
    """The cells of the page's table of clients."""
    lines = [line for line in PAGE.splitlines() if line.startswith("| [")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def blocks(title: str, language: str, addresses: Mapping[str, str]) -> list[str]:
    """The scripts or commands of a section, with other addresses in place of the page's."""
    [section] = re.findall(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", PAGE, flags=re.MULTILINE | re.DOTALL)
    found: list[str] = re.findall(rf"^```{language}\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)
    for old, new in addresses.items():
        found = [block.replace(old, new) for block in found]
    return found


def run(command: Sequence[str | Path], settings: Mapping[str, str] | None = None, limit: float = LIMIT_SECONDS) -> str:
    """What a client writes to standard output."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)),
        env=kept | SETTINGS | dict(settings or {}),
        capture_output=True, text=True, check=False, timeout=limit,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
