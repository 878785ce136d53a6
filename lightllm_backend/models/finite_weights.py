# SPDX-License-Identifier: Apache-2.0
"""FiniteWeights: refuses a checkpoint with NaN or infinite weights, which would fail every request.

Each weight is looked at on its device right after it is filled, and the host asks for the results once, at the end, so
that a GPU never waits for it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lightllm_backend.models.errors import ModelError
from lightllm_backend.models.weight_files import Source

# Numbers of 8 bits that are looked at twice in a row: 1 MiB, which a CPU's cache holds.
_CHUNK = 1 << 20


class FiniteWeights:
    """The weights that were filled, and whether each may hold NaN or infinities."""

    def __init__(self) -> None:
        self._filled: list[tuple[Source, Tensor]] = []
        self._doubts: list[Tensor] = []  # [] bool on the weights' device

    def note(self, source: Source, targets: Iterable[Tensor]) -> None:
        """Look at what a tensor of the checkpoint has filled."""
        for target in targets:
            if target.is_floating_point() and target.numel() > 0:
                self._filled.append((source, target))
                self._doubts.append(_may_hold_others(target))

    def check(self) -> None:
        """Raise ModelError, with the first tensor's name and how many of its numbers are not finite, if there is one.

        Waits for the device.
        """
        if not self._doubts:
            return
        found: dict[str, tuple[Source, torch.dtype, int]] = {}
        for (source, target), doubt in zip(self._filled, torch.stack(self._doubts).tolist(), strict=True):
            if doubt and (count := _count_others(target)):
                earlier = found[source.name][2] if source.name in found else 0
                found[source.name] = source, target.dtype, earlier + count
        if found:
            raise _error(*next(iter(found.values())), len(found) - 1)


def _error(source: Source, dtype: torch.dtype, count: int, others: int) -> ModelError:
    """The error for a tensor with so many numbers that are not finite, and for so many other tensors."""
    name = str(dtype).removeprefix("torch.")
    numbers = f"{count} numbers that are" if count > 1 else "a number that is"
    also = f"; so {'do' if others > 1 else 'does'} {others} other tensor{'s' * (others > 1)}" if others else ""
    limit = ", of at most 65504: --dtype bfloat16 or float32 has larger ones" if dtype == torch.float16 else ""
    return ModelError(
        f"{source.path}: {source.name} holds {numbers} {'NaN' if dtype.itemsize == 1 else 'NaN or infinite'} in {name}"
        f"{also}; finite numbers are needed{limit}"
    )


def _may_hold_others(values: Tensor) -> Tensor:
    """False [] if all numbers are finite. In one or two reductions, without memory for as many results."""
    if values.element_size() > 1:
        return ~torch.isfinite(values.sum())  # a sum of finite numbers is rarely infinite
    # float8_e4m3fn has no infinities, and two NaNs: the greatest byte with a sign, and the greatest without one.
    chunks = torch.split(values.flatten(), _CHUNK) if values.device.type == "cpu" else (values,)
    found = [(chunk.view(torch.int8).amax() == 0x7F) | (chunk.view(torch.uint8).amax() == 0xFF) for chunk in chunks]
    return torch.stack(found).any()


def _count_others(values: Tensor) -> int:
    """How many numbers are not finite. float32 has every number of the narrower dtypes."""
    counts = [torch.count_nonzero(~torch.isfinite(part.float())) for part in torch.split(values, 1024)]
    return int(torch.stack(counts).sum())
