# SPDX-License-Identifier: Apache-2.0
"""The slots of a quantised matrix's tensors, by how the checkpoint stores it."""

from __future__ import annotations

from collections.abc import Callable

from lightllm_backend.models.quantization import awq, eight_bit, gptq, on_the_fly, packed
from lightllm_backend.models.quantization.matrix import StoredMatrix
from lightllm_backend.models.quantization.scheme import Storage
from lightllm_backend.models.weights import WeightSlot

_READERS: dict[Storage, Callable[[StoredMatrix], dict[str, WeightSlot]]] = {
    Storage.AWQ: awq.slots,
    Storage.GPTQ: gptq.slots,
    Storage.GPTQ_V2: gptq.slots,
    Storage.PACKED: packed.slots,
    Storage.EIGHT_BIT: eight_bit.slots,
    Storage.ON_THE_FLY: on_the_fly.slots,
}


def matrix_slots(matrix: StoredMatrix) -> dict[str, WeightSlot]:
    """The names of the matrix's tensors in the checkpoint, and their slots."""
    return _READERS[matrix.scheme.storage](matrix)
