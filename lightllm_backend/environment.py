# SPDX-License-Identifier: Apache-2.0
"""Remembers the library path that a user set before tritonserver's was put in front. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

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
