# SPDX-License-Identifier: Apache-2.0
"""Embedding and Head: the two ends of a model, where a token is a row of a matrix."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from lightllm_backend.kernels.quantized.grid_weight import with_grid
from lightllm_backend.kernels.quantized.weight import Weight
from lightllm_backend.models.linear import LinearWeight, Part
from lightllm_backend.models.placement import Placement
from lightllm_backend.models.quantization.matrix import Span
from lightllm_backend.models.weights import HEAD, WeightSlot


class Embedding:
    """Token embeddings, with rows split over the ranks and padded to equal shares."""

    def __init__(self, vocab_size: int, hidden_size: int, place: Placement) -> None:
        self.parallel, self.kernels = place.parallel, place.kernels
        self.vocab_size = vocab_size
        rows, self.start, self.num_held = place.vocabulary_share(vocab_size)
        self.weight = place.empty(rows, hidden_size)
        self.is_head = False  # a tied head sets it
        self.as_head: Weight = self.weight  # what a tied head multiplies by
        self._finds_grids = place.quantization.finds_grids
        place.weights.append(self)

    def __call__(self, input_ids: Tensor) -> Tensor:
        if self.parallel.size == 1:
            return functional.embedding(input_ids, self.weight)
        if buffers := self.parallel.lamport_buffers(len(input_ids), self.weight.shape[1]):
            return self.kernels.all_reduce_embeddings(input_ids, self.weight, self.start, self.num_held, buffers)
        local = input_ids - self.start
        elsewhere = (local < 0) | (local >= self.num_held)
        vectors = functional.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return self.parallel.all_reduce(vectors.masked_fill_(elsewhere.unsqueeze(1), 0))

    def weight_map(self, name: str) -> dict[str, WeightSlot]:
        shape = (self.vocab_size, self.weight.shape[1])
        return {name: WeightSlot(self.weight[: self.num_held], shape, 0, self.start)}

    def arrange(self) -> None:
        if self._finds_grids and self.is_head:
            self.as_head = with_grid(self.weight)


def select_tokens(x: Tensor, residual: Tensor, last_tokens: Tensor | None) -> tuple[Tensor, Tensor]:
    """The rows of `x` and `residual` whose logits the step needs. `x` may be in parts, as for any norm."""
    if last_tokens is None:
        return x, residual
    # The residual first: the norm reads it before the kernel in front of it has ended (kernels.dependent_launch).
    residual = residual.index_select(0, last_tokens)
    return x.index_select(-2, last_tokens), residual


class Head:
    """Logits over the vocabulary, split over the ranks like the embeddings.

    Every rank gathers all logits, with the same bits, so that all choose the same tokens. If the head is tied, its
    weight is the embeddings', and it has no tensor in the checkpoint. With a soft cap c, a logit x is c * tanh(x / c).
    """

    def __init__(self, embedding: Embedding, tied: bool, place: Placement, soft_cap: float | None = None) -> None:
        self.place = place
        self.vocab_size = embedding.vocab_size
        self.embedding = embedding
        self.num_held = embedding.num_held
        self.soft_cap = soft_cap
        self._own = None if tied else self._own_weight()
        embedding.is_head = tied

    @property
    def tied(self) -> bool:
        return self._own is None

    @property
    def weight(self) -> Weight:
        return self.embedding.as_head if self._own is None else self._own.value

    def untie(self) -> None:
        """Allocate a weight of its own, which load_weights then fills."""
        self._own = self._own_weight()
        self.embedding.is_head = False

    def _own_weight(self) -> LinearWeight:
        rows, columns = self.embedding.weight.shape
        part = Part(HEAD.removesuffix(".weight"), self.vocab_size, self.num_held, self.embedding.start)
        return LinearWeight([part], Span(columns, 0, columns), self.place, rows)

    def __call__(self, x: Tensor) -> Tensor:
        kernels, parallel = self.place.kernels, self.place.parallel
        logits = kernels.linear(x, self.weight)
        buffers = parallel.gathering_buffers(*logits.shape)
        logits = kernels.all_gather(logits, buffers) if buffers else parallel.all_gather(logits)
        logits = logits[:, : self.vocab_size]
        return logits if self.soft_cap is None else logits.div_(self.soft_cap).tanh_().mul_(self.soft_cap)

    def weight_map(self) -> dict[str, WeightSlot]:
        return {} if self._own is None else self._own.weight_map()
