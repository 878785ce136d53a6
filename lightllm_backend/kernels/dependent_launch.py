# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Programmatic dependent launch (Hopper): a kernel starts while the previous one drains.

This hides the few microseconds that lie between two kernels. The rule, for each kernel launched this way:

- Every program calls `wait_for_previous` before it reads or writes anything that the previous kernel touches. The call
  returns once the previous kernel has ended and its writes are visible.
- That call lets the next kernel start. So when a kernel starts, all but the one right before it have ended.
- Before the call, a program may read weights, results of kernels two or more launches ago, and the step's inputs, which
  were copied to the device before an ordinary launch.
- A kernel may call `start_next` earlier, if what follows it reads nothing but weights and the step's inputs before its
  own wait: a product, whose weights are then on their way before two kernels have ended.
- Ordinary launches (torch's) wait for all kernels before them.

Letting every next kernel start at once is slower: 3.75 against 3.61 ms for a decode step of 7B on an H200. With weights
of 8 and 4 bits, norms and merges of attention that do so gain 5 % (2.29 to 2.18 ms, 1.70 to 1.60 ms).
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from lightllm_backend.kernels.hardware import compute_capability


@triton.jit
def start_next(is_dependent: tl.constexpr):
    """Lets the next kernel start at once."""
    if is_dependent:
        tl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def wait_for_previous(is_dependent: tl.constexpr):
    """Waits for the previous kernel to end, then lets the next one start. Does nothing in an ordinary launch."""
    if is_dependent:
        # Some versions of Triton-lang that support such launches lack functions for these, or fail to compile them.
        tl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
        tl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )


@lru_cache
def dependent_launch(device: torch.device, is_wanted: bool = True) -> dict[str, Any]:
    """The keyword arguments of a dependent launch, or of an ordinary one if the GPU or Triton-lang lacks support.

    Pass `is_wanted=False` for a kernel of few, long programs that would fit on a few multiprocessors: started early,
    they crowd onto those that the previous kernel leaves first, and the others stay idle.
    """
    if not is_wanted or not can_start_next(device):
        return {"is_dependent": False}
    return {"is_dependent": True, "launch_pdl": True}


@lru_cache
def can_start_next(device: torch.device) -> bool:
    """Whether kernels may call `start_next`, however they are launched themselves."""
    return compute_capability(device) >= (9, 0) and _is_known()


def _is_known() -> bool:
    from triton.backends.nvidia.compiler import CUDAOptions

    return "launch_pdl" in CUDAOptions.__dataclass_fields__
