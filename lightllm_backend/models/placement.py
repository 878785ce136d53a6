# SPDX-License-Identifier: Apache-2.0
"""Placement: how a rank makes its tensors, which share of the model they hold, and in how many bits."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from lightllm_backend.kernels.interface import Kernels
from lightllm_backend.models.errors import ModelError
from lightllm_backend.models.quantization.scheme import UNQUANTISED, Quantization, WeightScheme
from lightllm_backend.parallel import TensorParallel


class Arrangeable(Protocol):
    """A weight whose order the kernels may choose, once it is filled."""

    def arrange(self) -> None:
        """Bring it into that order."""


@dataclass(frozen=True)
class Placement:
    """How a rank makes its tensors (dtype, device), which share of the model they hold, and its kernels."""

    parallel: TensorParallel
    dtype: torch.dtype
    device: torch.device
    kernels: Kernels  # kernels.select()'s choice for the device
    quantization: Quantization = UNQUANTISED
    path: str = ""  # what the names of layers begin with in a checkpoint
    weights: list[Arrangeable] = field(default_factory=list)  # of all layers made with it

    def within(self, path: str) -> Placement:
        """The same for layers whose names begin with `path`."""
        return replace(self, path=f"{path}.")

    def arrange_weights(self) -> None:
        for weight in self.weights:
            weight.arrange()

    def scheme(self, name: str) -> WeightScheme | None:
        """How the weight of this linear layer is quantised, or None if it is not."""
        return self.quantization.scheme(self.path + name)

    def left_out_by(self, name: str) -> str:
        """What in the configuration leaves this linear layer unquantised, for errors; empty if no key does."""
        return self.quantization.left_out_by(self.path + name)

    def empty(self, *shape: int) -> Tensor:
        """An uninitialised parameter."""
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def share(self, what: str, count: int) -> int:
        """This rank's share of `count` things; the number of ranks must divide it."""
        if count % self.parallel.size != 0:
            raise ModelError(f"{what} is {count}, which tp = {self.parallel.size} does not divide")
        return count // self.parallel.size

    def kv_share(self, count: int) -> tuple[int, int]:
        """This rank's number of `count` KV heads, and the first of them. Ranks share a head if there are too few."""
        rank, size = self.parallel.rank, self.parallel.size
        if count % size != 0 and size % count != 0:
            raise ModelError(f"num_key_value_heads is {count}, which must divide tp = {size} or be divided by it")
        return max(1, count // size), rank * count // size

    def vocabulary_share(self, vocab_size: int) -> tuple[int, int, int]:
        """This rank's rows of the padded vocabulary: how many, the first, and how many are tokens.

        Shares are multiples of 8 rows, since GPUs are slow at matrix products whose result has unaligned rows.
        """
        if self.parallel.size == 1:
            return vocab_size, 0, vocab_size
        rows = -(-vocab_size // (8 * self.parallel.size)) * 8
        start = min(rows * self.parallel.rank, vocab_size)
        return rows, start, min(rows, vocab_size - start)
