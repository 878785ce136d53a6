# SPDX-License-Identifier: Apache-2.0
"""Kernels run in Triton-lang's interpreter where there is no GPU; it must be asked for before a kernel is imported."""

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def device() -> torch.device:
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return torch.device("cpu" if is_interpreted else "cuda")


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Fixed random numbers, and NaN in memory that nobody has written."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
