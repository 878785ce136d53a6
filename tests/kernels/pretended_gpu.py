# SPDX-License-Identifier: Apache-2.0
"""What the kernels' launchers are told of a GPU that is not there."""

import importlib
import pkgutil
from typing import Any

from lightllm_backend import kernels

# As many as an H100 has, so that a long context is split.
MULTIPROCESSORS = 132


def pretend_gpu(capability: tuple[int, int]) -> None:
    """From now on, in every module of kernels."""
    told: dict[str, Any] = {"compute_capability": capability, "multiprocessor_count": MULTIPROCESSORS, "has_ptx": True}
    for module in pkgutil.walk_packages(kernels.__path__, f"{kernels.__name__}."):
        for name, value in told.items():
            if hasattr(importlib.import_module(module.name), name):
                setattr(importlib.import_module(module.name), name, lambda _, value=value: value)
