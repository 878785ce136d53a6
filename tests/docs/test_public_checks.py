# SPDX-License-Identifier: Apache-2.0
"""The public workflow, the hooks before a commit and the changelog, against what CI runs and the version."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
BUILD = (ROOT / "build.sh").read_text(encoding="utf-8")
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def load(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def test_the_workflow_runs_ci_on_each_python() -> None:
    job = load(".github/workflows/ci.yml")["jobs"]["test"]
    assert job["steps"][-1] == {"run": ".ci/run"}
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
    [lowest, end] = re.findall(r'requires-python = ">=3\.(\d+),<3\.(\d+)"', PROJECT)[0]
    assert job["strategy"]["matrix"]["python"] == [f"3.{minor}" for minor in range(int(lowest), int(end))]


def test_each_hook_is_a_check_of_ci() -> None:
    [repository] = load(".pre-commit-config.yaml")["repos"]
    checks = [line.strip() for line in BUILD.splitlines()]
    assert [hook["entry"] for hook in repository["hooks"] if hook["entry"] not in checks] == []
    assert all(hook["language"] == "system" and not hook["pass_filenames"] for hook in repository["hooks"])


def test_the_changelog_begins_with_the_version() -> None:
    [version] = re.findall(r'^version = "(.*)"$', PROJECT, flags=re.MULTILINE)
    versions = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert next(name for name in versions if name != "Unreleased") == version
    assert "Unreleased" not in versions[1:]
