# SPDX-License-Identifier: Apache-2.0
"""What the kernels in Gluon share: the part of Triton-lang that leaves to a kernel which warps do what.

Gluon is experimental, and other versions of it name things otherwise; hardware.GLUON_TRIED tells which are used.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# Of the warps of a partition; and a copy by TMA. Renamed in 3.7, and in 3.9.
synchronize = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
copy_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


def tile_descriptor(x: Tensor, shape: Sequence[int], block: Sequence[int]) -> TensorDescriptor:
    """By which a kernel copies tiles of `x`, seen as a matrix of this shape whose rows are those of `x`."""
    element = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[x.dtype]
    layout = gl.NVMMASharedLayout.get_default_for(list(block), element)
    return TensorDescriptor(x, list(shape), [x.stride(0), 1], list(block), layout)
