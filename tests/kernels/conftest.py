# SPDX-License-Identifier: Apache-2.0
"""Where the kernels' tensors are: on the CPU if Triton-lang's interpreter runs them (see tests/conftest.py), which is
made twice as fast."""

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton.runtime import interpreter

patch_language = interpreter._patch_lang
PATCHED: set[str] = set()


def patch_language_once(function: Any) -> SimpleNamespace:
    """Patches what the function's module sees of triton.language, at the first call alone.

    The interpreter of Triton-lang 3.9 does it at every call of a device function, which takes half of its time.
    """
    if function.__module__ not in PATCHED:
        PATCHED.add(function.__module__)
        patch_language(function)
    return SimpleNamespace(restore=lambda: None)


if os.environ.get("TRITON_INTERPRET") == "1":
    interpreter._patch_lang = patch_language_once


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
