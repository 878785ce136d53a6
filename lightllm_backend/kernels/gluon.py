# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Shared by the kernels in Gluon, the part of Triton-lang in which a kernel assigns work to warps itself.

Gluon is experimental and renames things between versions; hardware.GLUON_TRIED guards its use.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from lightllm_backend.kernels.activation.gate import SIGMOID

# A barrier of one partition's warps, renamed in 3.7, a TMA copy, and one by threads, both renamed in 3.9.
synchronize = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
copy_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
copy_by_threads = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared

ELEMENTS = {
    torch.bfloat16: gl.bfloat16,
    torch.float16: gl.float16,
    torch.int8: gl.int8,
    torch.float8_e4m3fn: gl.float8e4nv,
}


@gluon.jit
def activated(gate, is_gelu: gl.constexpr):
    """As activation.gate's."""
    argument = gate
    if is_gelu:
        argument = 1.5957691216057308 * gate * (1.0 + 0.044715 * gate * gate)
    return gate * gl.inline_asm_elementwise(SIGMOID, "=f,f", [argument], dtype=gl.float32, is_pure=True, pack=1)


def tile_descriptor(x: Tensor, shape: Sequence[int], block: Sequence[int]) -> TensorDescriptor:
    """A TMA descriptor for tiles of `x`, seen as a matrix of `shape` with the row stride of `x`."""
    return TensorDescriptor(x, list(shape), [x.stride(0), 1], list(block), shared_layout(tuple(block), x.dtype))


@lru_cache
def shared_layout(block: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """How TMA lays a block out in shared memory."""
    return gl.NVMMASharedLayout.get_default_for(list(block), ELEMENTS[dtype])
