# SPDX-License-Identifier: Apache-2.0
"""Programs for tests that only Debian and Ubuntu package, put into the environment's `bin` without root's rights.

`python -m tests.debian` fetches those that are not on PATH. A test whose program is missing skips itself.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PROGRAMS = {"haproxy": "haproxy", "nginx": "nginx", "promtool": "prometheus"}  # the package of each
SECONDS = 120  # for each command
FOLDER = Path(sys.prefix) / "debian"
BIN = Path(sys.prefix) / "bin"


def missing() -> list[str]:
    path = f"{BIN}:/usr/sbin:/usr/local/sbin"
    return [name for name in PROGRAMS if not shutil.which(name) and not shutil.which(name, path=path)]


def fetch(names: list[str]) -> None:
    """Download the packages of these programs and what they need beyond the system's, and take programs and libraries.

    Raises OSError or subprocess.SubprocessError if a command is missing, fails or takes too long.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for partial in ("lists/partial", "cache/archives/partial"):
            (folder / partial).mkdir(parents=True)
        options = [f"Dir::State::Lists={folder}/lists", f"Dir::Cache={folder}/cache", "Debug::NoLocking=true"]
        options += ["APT::Sandbox::User=root"]  # who may not become _apt needs not
        apt = ["apt-get", "-qq", *(argument for option in options for argument in ("-o", option))]
        _run([*apt, "update"])
        packages = [PROGRAMS[name] for name in names]
        _run([*apt, "install", "--yes", "--download-only", "--no-install-recommends", *packages])
        for package in folder.glob("cache/archives/*.deb"):
            _extract(package, names)
    libraries = ":".join(sorted({str(file.parent) for file in FOLDER.rglob("*.so*")}))
    for program in names:
        [path] = [file for file in FOLDER.rglob(program) if file.parent.name in ("bin", "sbin")]
        script = BIN / program
        script.write_text(f'#!/bin/sh\nLD_LIBRARY_PATH={libraries} exec {path} "$@"\n')
        script.chmod(0o755)


def _extract(package: Path, names: list[str]) -> None:
    """Extract the programs and shared libraries of a package into FOLDER."""
    archive = package.with_suffix(".tar")
    with archive.open("wb") as file:
        subprocess.run(["dpkg-deb", "--fsys-tarfile", package], stdout=file, timeout=SECONDS, check=True)
    with tarfile.open(archive) as files:
        for member in files:
            path = Path(member.name)
            if ".so" not in path.suffixes and (path.name not in names or path.parent.name not in ("bin", "sbin")):
                continue
            (FOLDER / path).parent.mkdir(parents=True, exist_ok=True)
            (FOLDER / path).unlink(missing_ok=True)
            if member.issym():
                (FOLDER / path).symlink_to(member.linkname)
            elif (file := files.extractfile(member)) is not None:
                (FOLDER / path).write_bytes(file.read())
                (FOLDER / path).chmod(0o755)


def _run(command: list[str]) -> None:
    subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, timeout=SECONDS, check=True)


if __name__ == "__main__":
    try:
        if names := missing():
            fetch(names)
    except (OSError, subprocess.SubprocessError) as error:
        sys.exit(f"{' and '.join(missing())} could not be fetched: {error}")
