# SPDX-License-Identifier: Apache-2.0
"""Plain PyTorch of the all-reduce with its norm; kernels/interface.py says what each function computes."""

import torch
from torch import Tensor

from lightllm_backend.kernels.collective.lamport_buffers import EMPTY, SENT_FOR_EMPTY, LamportBuffers
from lightllm_backend.kernels.norm.reference import rms_norm, sum_of_parts


def all_reduce_rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor,
    buffers: LamportBuffers,
    post_weight: Tensor | None = None,
) -> Tensor:
    tokens, rank = x.shape[-2], buffers.rank
    own, ranks = buffers.by_rank[rank], len(buffers.by_rank)
    token, turn = torch.arange(tokens, device=x.device), buffers.turns[:tokens].long()
    product = sum_of_parts(x).to(residual.dtype).contiguous().view(own.dtype)

    def send(receiver: int, rows: Tensor, bits: Tensor) -> None:
        bits = bits.masked_fill(bits == EMPTY, SENT_FOR_EMPTY)
        buffers.by_rank[receiver][turn[rows], rank, token[rows]] = bits

    def receive(senders: Tensor, rows: Tensor) -> Tensor:
        place = (turn[rows], senders, token[rows])
        while bool(((arrived := own[place]) == EMPTY).any()):
            pass
        own[place] = EMPTY
        return arrived.view(residual.dtype)

    in_two_shots = buffers.use_two_shots(tokens)
    # The rank that sums each row.
    adders = [token % ranks == other if in_two_shots else token >= 0 for other in range(ranks)]
    for other in range(ranks):
        send(other, adders[other], product[adders[other]])
    mine, theirs = adders[rank], ~adders[rank]
    arrived = [receive(torch.full_like(token[mine], sender), mine) for sender in range(ranks)]
    total = torch.stack(arrived).float().sum(0)
    if post_weight is not None:
        total = rms_norm(total, post_weight, eps).to(residual.dtype).float()
    residual[mine] = (residual[mine].float() + total).to(residual.dtype)
    if in_two_shots:
        for other in range(ranks):
            if other != rank:
                send(other, mine, residual[mine].view(own.dtype))
        residual[theirs] = receive(token[theirs] % ranks, theirs)
    buffers.turns[:tokens] = 1 - turn
    return rms_norm(residual, weight, eps)
