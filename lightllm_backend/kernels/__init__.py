# SPDX-License-Identifier: Apache-2.0
"""The engine's kernels: Triton-lang launchers, and a plain PyTorch reference of each, both behind interface.py."""

import torch

from lightllm_backend.kernels.interface import Kernels


def select(device: torch.device | str) -> Kernels:
    """The kernels that compute on `device`: the launchers on a GPU, the references elsewhere.

    The launchers are imported only here, so that a CPU engine runs without Triton-lang.
    """
    if torch.device(device).type == "cuda":
        from lightllm_backend.kernels import launchers

        return launchers
    from lightllm_backend.kernels import reference

    return reference
