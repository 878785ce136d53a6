# SPDX-License-Identifier: Apache-2.0
"""Plain PyTorch of the exchanges through Lamport buffers; kernels/interface.py says what each function computes."""

import torch
from torch import Tensor

from lightllm_backend.kernels.collective.lamport_buffers import EMPTY, SENT_FOR_EMPTY, LamportBuffers
from lightllm_backend.kernels.norm.reference import rms_normed, sum_of_parts
from lightllm_backend.kernels.quantized.rounded_tokens import Activations
from lightllm_backend.kernels.quantized.weight import Weight


class _Exchange:
    """One turn of the first `count` rows of the buffers."""

    def __init__(self, buffers: LamportBuffers, count: int) -> None:
        self._buffers, self._own = buffers, buffers.by_rank[buffers.rank]
        self.rows = torch.arange(count, device=self._own.device)
        self._turn = buffers.turns[:count].long()

    def send(self, receiver: int, rows: Tensor, values: Tensor) -> None:
        """Send `values`, as this rank's, to some rows, given by a mask."""
        bits = values.contiguous().view(self._own.dtype)
        bits = bits.masked_fill(bits == EMPTY, SENT_FOR_EMPTY)
        self._buffers.by_rank[receiver][self._turn[rows], self._buffers.rank, self.rows[rows]] = bits

    def receive(self, senders: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Wait for a sender's values at each of some rows, and clear their places."""
        place = (self._turn[rows], senders, self.rows[rows])
        while bool(((arrived := self._own[place]) == EMPTY).any()):
            pass
        self._own[place] = EMPTY
        return arrived.view(dtype)

    def all_to_all(self, values: Tensor) -> list[Tensor]:
        """Send `values` to all, and receive all ranks'."""
        everywhere = torch.ones_like(self.rows, dtype=torch.bool)
        ranks = range(len(self._buffers.by_rank))
        for rank in ranks:
            self.send(rank, everywhere, values)
        return [self.receive(torch.full_like(self.rows, rank), everywhere, values.dtype) for rank in ranks]

    def end(self) -> None:
        self._buffers.turns[: len(self.rows)] = (1 - self._turn).int()


def all_reduce_rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor,
    buffers: LamportBuffers,
    post_weight: Tensor | None = None,
    reader: Weight | None = None,  # noqa: ARG001 - products round what they read
) -> Activations:
    tokens, rank = x.shape[-2], buffers.rank
    ranks = len(buffers.by_rank)
    exchange = _Exchange(buffers, tokens)
    token = exchange.rows
    product = sum_of_parts(x).to(residual.dtype)
    in_two_shots = buffers.use_two_shots(tokens)
    # The rank that sums each row.
    adders = [token % ranks == other if in_two_shots else token >= 0 for other in range(ranks)]
    for other in range(ranks):
        exchange.send(other, adders[other], product[adders[other]])
    mine, theirs = adders[rank], ~adders[rank]
    arrived = [exchange.receive(torch.full_like(token[mine], sender), mine, product.dtype) for sender in range(ranks)]
    total = torch.stack(arrived).float().sum(0)
    if post_weight is not None:
        total = rms_normed(total, post_weight, eps).to(residual.dtype).float()
    residual[mine] = (residual[mine].float() + total).to(residual.dtype)
    if in_two_shots:
        for other in range(ranks):
            if other != rank:
                exchange.send(other, mine, residual[mine])
        residual[theirs] = exchange.receive(token[theirs] % ranks, theirs, residual.dtype)
    exchange.end()
    return rms_normed(residual, weight, eps)


def all_reduce_embeddings(
    input_ids: Tensor, weight: Tensor, first_id: int, held: int, buffers: LamportBuffers
) -> Tensor:
    exchange = _Exchange(buffers, len(input_ids))
    local = input_ids.long() - first_id
    elsewhere = (local < 0) | (local >= held)
    own = weight[local.masked_fill(elsewhere, 0)].masked_fill(elsewhere.unsqueeze(1), 0)
    total = torch.stack(exchange.all_to_all(own)).float().sum(0).to(weight.dtype)
    exchange.end()
    return total


def all_gather(x: Tensor, buffers: LamportBuffers) -> Tensor:
    dim, pieces = buffers.by_rank[0].shape[3], buffers.pieces(x.shape[1])
    exchange = _Exchange(buffers, len(x) * pieces)
    padded = x.new_zeros(len(x), pieces * dim)
    padded[:, : x.shape[1]] = x
    gathered = [of_rank.view(padded.shape)[:, : x.shape[1]] for of_rank in exchange.all_to_all(padded.view(-1, dim))]
    exchange.end()
    return torch.cat(gathered, 1)
