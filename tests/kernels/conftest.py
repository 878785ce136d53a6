# SPDX-License-Identifier: Apache-2.0
"""Where the kernels' tensors are: on the CPU if Triton-lang's interpreter runs them (see tests/conftest.py)."""

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return torch.device("cpu" if is_interpreted else "cuda")


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Fixed random numbers, and NaN in memory that nobody has written."""
    torch.manual_seed(0)
    torch.set_deterministic_debug_mode("warn")  # use_deterministic_algorithms takes seconds: it imports torch._inductor
    yield
    torch.set_deterministic_debug_mode("default")
