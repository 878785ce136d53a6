# SPDX-License-Identifier: Apache-2.0
"""NormWeight: the weight of an RMS norm, which every rank holds whole."""

from __future__ import annotations

import torch

from lightllm_backend.models.placement import Placement
from lightllm_backend.models.weights import WeightSlot


class NormWeight:
    """What a norm multiplies by [size]: a tensor of the checkpoint in the model's dtype.

    If weights count from one, it is 1 plus the tensor, in float32, which a narrower dtype would round.
    """

    def __init__(self, name: str, size: int, place: Placement, from_one: bool = False) -> None:
        self.name = name
        self.value = torch.empty(size, dtype=torch.float32 if from_one else place.dtype, device=place.device)
        self._offset = 1.0 if from_one else 0.0

    def weight_map(self) -> dict[str, WeightSlot]:
        return {f"{self.name}.weight": WeightSlot.whole(self.value, mean=1.0, offset=self._offset)}
