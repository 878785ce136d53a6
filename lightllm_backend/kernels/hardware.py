# SPDX-License-Identifier: Apache-2.0
"""What the launchers choose their block sizes by."""

from functools import lru_cache

import torch
import triton
from torch import Tensor

try:
    from triton.tools.tensor_descriptor import TensorDescriptor as TensorDescriptor  # noqa: PLC0414 (exported)
except ImportError:  # an older Triton-lang
    TensorDescriptor = None

# The first two numbers of its version.
TRITON_LANG = tuple(int(number) for number in triton.__version__.split(".")[:2])
# Whether Gluon, which is experimental, is one that our kernels were tried with on a GPU. Others compile them too.
GLUON_TRIED = TRITON_LANG == (3, 6)

# Columns that the right operand of a matrix product has at least: a tensor core's own 8, where Triton-lang knows it.
SMALLEST_COLUMNS = 8 if TRITON_LANG >= (3, 5) else 32


@lru_cache
def compute_capability(device: torch.device) -> tuple[int, int]:
    """The GPU's compute capability; Triton-lang's interpreter, which runs on the CPU, passes for an A100."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)


@lru_cache
def multiprocessor_count(device: torch.device) -> int:
    """How many programs the GPU runs side by side, at one each multiprocessor."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


def has_ptx(device: torch.device) -> bool:
    """Whether a kernel may hold instructions of the GPU itself that have two results: Triton-lang's interpreter knows
    none, and version 3.2 crashes at them."""
    return device.type == "cuda" and TRITON_LANG >= (3, 3)


def has_descriptors(*tensors: Tensor) -> bool:
    """Whether a kernel may read tiles of these by descriptors, which Hopper copies as a whole. Rows are contiguous."""
    return (
        TensorDescriptor is not None
        and all(compute_capability(x.device) >= (9, 0) for x in tensors)
        and all(x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0 for x in tensors)
    )
