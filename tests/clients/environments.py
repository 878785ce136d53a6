# SPDX-License-Identifier: Apache-2.0
"""Virtual environments for clients whose packages cannot be installed beside the project's own.

Each has the packages of a list in this folder, lies under the list's name in the project's environment, and is brought
up to date when the list has changed. `python -m tests.clients.environments clients` does so beforehand.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


class EnvironmentMissing(RuntimeError):
    """The environment could not be made; the message says at which command."""


def environment(name: str) -> Path:
    """Return the `bin` folder of the environment with the packages of NAME.txt, which is made if it is not there."""
    packages = FOLDER / f"{name}.txt"
    directory = Path(sys.prefix) / name
    python, stamp = directory / "bin" / "python", directory / ".packages"
    state = hashlib.sha256(packages.read_bytes()).hexdigest()
    if not stamp.exists() or stamp.read_text() != state:
        _run(sys.executable, "-m", "venv", "--clear", directory)
        # The list is complete: nothing is left to look up.
        _run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "-r", packages)
        stamp.write_text(state)
    return python.parent


def _run(*arguments: str | Path) -> None:
    command = [str(argument) for argument in arguments]
    if code := subprocess.run(command, check=False).returncode:
        raise EnvironmentMissing(f"{' '.join(command)} ended with exit code {code}")


if __name__ == "__main__":
    for asked in sys.argv[1:]:
        print(environment(asked))
