# SPDX-License-Identifier: Apache-2.0
"""Kernels run in Triton-lang's interpreter where there is no GPU; it must be asked for before a kernel is imported."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def device() -> torch.device:
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return torch.device("cpu" if is_interpreted else "cuda")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
