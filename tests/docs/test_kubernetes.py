# SPDX-License-Identifier: Apache-2.0
"""The page on Kubernetes against the chart and the manifests that it names."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import yaml

from tests.deploy.helm import CHART, DEPLOY, helm, program
from tests.deploy.test_chart import VERSIONS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8")


def test_the_helm_commands_install_the_chart(monkeypatch: Any) -> None:
    """Rendered instead of installed. kubectl and charts of others need a cluster and their repositories."""
    monkeypatch.chdir(ROOT)
    commands = re.findall(r"^\$ helm install (\w+ deploy/helm/lightllm.*)$", PAGE, re.MULTILINE)
    assert len(commands) >= 3
    for command in commands:
        run = helm("template", *shlex.split(command))
        assert run.returncode == 0, run.stderr


def test_every_value_that_is_named_exists() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    named = re.findall(r"`((?:{})(?:\.\w+)*)`".format("|".join(values)), PAGE)
    assert len(named) > 15
    for path in set(named):
        found: Any = values
        for key in path.split("."):
            assert key in found, path
            found = found[key]
    assert f"`startup.seconds` ({values['startup']['seconds']})" in PAGE
    assert f"`preStopSeconds` ({values['preStopSeconds']})" in PAGE


def test_every_example_is_in_the_table() -> None:
    listed = re.findall(r"^\| `([\w-]+\.yaml)` \|", PAGE, re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in (DEPLOY / "helm" / "values").glob("*"))
    assert all(f"`deploy/kubernetes/{path.name}`" in PAGE for path in (DEPLOY / "kubernetes").glob("*"))


def test_the_versions_are_those_that_are_tested() -> None:
    assert f"Kubernetes {' and '.join(VERSIONS)}" in PAGE
    [version] = re.findall(r"by helm ([\d.]+) itself", PAGE)
    assert helm("version", "--template={{.Version}}").stdout == f"v{version}"
    assert program().stat().st_mode & 0o111
