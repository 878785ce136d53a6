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

HAS_GPU = torch.cuda.is_available()
collect_ignore = [] if HAS_GPU else ["gpu"]

# Without a GPU, kernels run in Triton-lang's interpreter.
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_report_header() -> str | None:
    return None if HAS_GPU else "without an NVIDIA GPU: tests/gpu is left out"
