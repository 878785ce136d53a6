# SPDX-License-Identifier: Apache-2.0
"""The engine's kernels: Triton-lang launchers, and of each a plain PyTorch reference with its name and signature."""

from types import ModuleType

import torch


def select(device: torch.device | str) -> ModuleType:
    """The module whose functions compute on `device`: the launchers on a GPU, the references elsewhere.

    The launchers are imported only here, so that a CPU engine runs without Triton-lang.
    """
    if torch.device(device).type == "cuda":
        from lightllm_backend.kernels import launchers

        return launchers
    from lightllm_backend.kernels import reference

    return reference
