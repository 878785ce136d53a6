# SPDX-License-Identifier: Apache-2.0
"""What holds for all tests: the environment before torch or a kernel is imported, and time limits."""

import os

# Threads that spin at OpenMP's barriers take the core that the awaited thread needs (see generation/worker_group.py).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import hypothesis
import torch

# A test that is slow for once, beside other work, is no failure.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")

# Where there is no GPU, kernels run in Triton-lang's interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
