# SPDX-License-Identifier: Apache-2.0
"""The engine's kernels: Triton-lang launchers, and a plain PyTorch reference of each, both behind interface.py."""

import importlib.util

import torch

from lightllm_backend.kernels.interface import Kernels


def select(device: torch.device | str, compiled: bool = False) -> Kernels:
    """The kernels that compute on `device`: the launchers on a GPU, the references elsewhere, `compiled` or not.

    The launchers are imported only here, so that a CPU engine runs without Triton-lang. It runs without numba as well,
    which compiles.
    """
    if torch.device(device).type == "cuda":
        from lightllm_backend.kernels import launchers

        return launchers
    if compiled and importlib.util.find_spec("numba"):
        from lightllm_backend.kernels import compiled as kernels

        return kernels
    from lightllm_backend.kernels import reference

    return reference
