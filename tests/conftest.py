# SPDX-License-Identifier: Apache-2.0
"""What must be in the environment before torch or a kernel is imported, by whichever test comes first."""

import os

# Threads that spin at OpenMP's barriers take the core that the awaited thread needs (see generation/worker_group.py).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

# Where there is no GPU, kernels run in Triton-lang's interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
