# SPDX-License-Identifier: Apache-2.0
"""NormWeight: the weight of an RMS norm, which every rank holds whole."""

from __future__ import annotations

from lightllm_backend.models.placement import Placement
from lightllm_backend.models.weights import WeightSlot


class NormWeight:
    """What a norm multiplies by [size]: a tensor of the checkpoint, in the model's dtype."""

    def __init__(self, name: str, size: int, place: Placement) -> None:
        self.name = name
        self.value = place.empty(size)

    def weight_map(self) -> dict[str, WeightSlot]:
        return {f"{self.name}.weight": WeightSlot.whole(self.value, mean=1.0)}
