# SPDX-License-Identifier: Apache-2.0
"""The environment of the processes that we start from inside tritonserver's. Standard library only."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from pathlib import Path

STUB = "triton_python_backend_stub"  # the program that runs a model of Triton server's Python backend
ORIGINAL_LIBRARY_PATH = "LIGHTLLM_ORIGINAL_LD_LIBRARY_PATH"


def remember_library_path(environment: MutableMapping[str, str]) -> None:
    """Write the library path into another variable, from which `original_environment` restores it."""
    environment.setdefault(ORIGINAL_LIBRARY_PATH, environment.get("LD_LIBRARY_PATH", ""))


def original_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without the server's libraries, for the engine's workers."""
    restored = dict(environment)
    library_path = restored.pop(ORIGINAL_LIBRARY_PATH, None)
    if library_path:
        restored["LD_LIBRARY_PATH"] = library_path
    elif library_path == "":
        restored.pop("LD_LIBRARY_PATH", None)
    return restored


def package_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment in which any interpreter finds this package; without the server's own libraries."""
    restored = original_environment(environment)
    package_parent = str(Path(__file__).resolve().parents[1])
    paths = [package_parent, *filter(None, restored.get("PYTHONPATH", "").split(os.pathsep))]
    restored["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    restored["PYTHONUTF8"] = "1"  # paths and messages are UTF-8 on both sides
    return restored
