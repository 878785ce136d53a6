# SPDX-License-Identifier: Apache-2.0
"""What the launchers ask of the GPU and of Triton-lang."""

from functools import lru_cache

import torch
import triton
from torch import Tensor

try:
    from triton.tools.tensor_descriptor import TensorDescriptor as TensorDescriptor  # noqa: PLC0414 (exported)
except ImportError:  # an older Triton-lang
    TensorDescriptor = None

TRITON_LANG_VERSION = tuple(int(number) for number in triton.__version__.split(".")[:2])
# Gluon is experimental: our kernels run only with the version that they were tried with on a GPU.
GLUON_TRIED = TRITON_LANG_VERSION == (3, 6)

# The fewest columns of a matrix product's right operand: 8 as in tensor cores, if Triton-lang supports it.
MIN_COLUMNS = 8 if TRITON_LANG_VERSION >= (3, 5) else 32


@lru_cache
def compute_capability(device: torch.device) -> tuple[int, int]:
    """The GPU's compute capability; Triton-lang's interpreter, on the CPU, counts as an A100."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)


@lru_cache
def multiprocessor_count(device: torch.device) -> int:
    """The number of the GPU's multiprocessors; 8 for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


def has_ptx(device: torch.device) -> bool:
    """Whether kernels may use inline PTX with two results: the interpreter cannot run it, and version 3.2 crashes."""
    return device.type == "cuda" and TRITON_LANG_VERSION >= (3, 3)


def has_descriptors(*tensors: Tensor) -> bool:
    """Whether kernels may read tiles of these tensors, whose rows are contiguous, by TMA descriptors (Hopper)."""
    return (
        TensorDescriptor is not None
        and all(compute_capability(x.device) >= (9, 0) for x in tensors)
        and all(x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0 for x in tensors)
    )
