# SPDX-License-Identifier: Apache-2.0
"""check_gpu: tells at once that there is no GPU. It asks NVIDIA's driver, since importing torch takes seconds."""

from __future__ import annotations

import ctypes

from lightllm_backend.config import ConfigError

LIBRARY = "libcuda.so.1"  # as torch loads it; containers and WSL bring it with the GPUs
SUCCESS, NO_DEVICE = 0, 100  # CUresult


def check_gpu(library: str = LIBRARY) -> None:
    """Raise ConfigError if no GPU can be used. Devices that CUDA_VISIBLE_DEVICES hides are not there."""
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        raise _no_gpu(f"NVIDIA's driver ({library}) is not installed, or not in this container") from None
    result = driver.cuInit(0)
    if result == NO_DEVICE:
        raise _no_gpu("NVIDIA's driver finds no GPU")
    if result != SUCCESS:
        raise _no_gpu(f"NVIDIA's driver does not start: {_error_text(driver, result)}")


def _no_gpu(why: str) -> ConfigError:
    return ConfigError(f"device is 'cuda', but {why}; allowed here: auto | cpu")


def _error_text(driver: ctypes.CDLL, result: int) -> str:
    text = ctypes.c_char_p()
    driver.cuGetErrorString(result, ctypes.byref(text))
    return f"error {result}, {text.value.decode() if text.value else 'unknown'}"
