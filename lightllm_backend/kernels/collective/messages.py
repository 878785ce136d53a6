# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""What the kernels of this folder share: how a program sends a row to other ranks, and waits for theirs.

Each program handles one row. It sends the row to the other ranks and waits for theirs (see lamport_buffers.py), never
for other programs of its own rank. GPUs start programs in order, so the first unfinished row is running, or will run,
on all ranks: there is always progress, however few programs fit at once.

A function takes `first`, the number in a buffer at which rank 0's row begins in this turn, and `sender_stride`, how
much later the next rank's begins.
"""

import triton
import triton.language as tl


@triton.jit
def as_bits(row, empty: tl.constexpr, sent_for_empty: tl.constexpr, bits_type: tl.constexpr):
    bits = row.to(bits_type, bitcast=True)
    return tl.where(bits == empty, sent_for_empty, bits).to(bits_type)


@triton.jit
def address_of(buffers, receiver):
    """The address of a rank's buffer. To be loaded early: between a product and its sum, even this takes time."""
    return tl.load(buffers + receiver)


@triton.jit
def send(address, own_buffer, offset, bits, live):
    buffer = tl.multiple_of(address.to(own_buffer.dtype), 16)
    # Write through to the other GPU's memory at once.
    tl.store(buffer + offset, bits, mask=live, cache_modifier=".wt")


@triton.jit
def send_to_others(
    buffers, next_address, own_buffer, first, bits, live, sender_stride, column, rank: tl.constexpr, ranks: tl.constexpr
):
    """`next_address` is that of the next rank's buffer."""
    offset = first + rank * sender_stride + column
    if ranks > 1:
        send(next_address, own_buffer, offset, bits, live)
    # Start with different receivers.
    for distance in tl.static_range(2, ranks):
        send(address_of(buffers, (rank + distance) % ranks), own_buffer, offset, bits, live)


@triton.jit
def receive(place, live, row_type: tl.constexpr, empty: tl.constexpr):
    """Poll for one rank's row until all of it has arrived, then clear its place."""
    bits = tl.load(place, mask=live, other=0, volatile=True)
    while tl.max((bits == empty).to(tl.int32), 0) > 0:
        bits = tl.load(place, mask=live, other=0, volatile=True)
    # The reduction is over, so every thread has read.
    tl.store(place, tl.full(bits.shape, empty, dtype=bits.dtype), mask=live)
    return bits.to(row_type, bitcast=True)


@triton.jit
def receive_sum(
    place,
    own_bits,
    live,
    sender_stride,
    row_type: tl.constexpr,
    rank: tl.constexpr,
    ranks: tl.constexpr,
    empty: tl.constexpr,
):
    """Sum all ranks' rows in float32, in order of rank, so that every rank gets the same bits."""
    total = tl.zeros(own_bits.shape, dtype=tl.float32)
    missing = 1
    while missing > 0:
        total = tl.zeros(own_bits.shape, dtype=tl.float32)
        is_missing = tl.zeros(own_bits.shape, dtype=tl.int32)
        for sender in tl.static_range(ranks):
            arrived = own_bits
            if sender != rank:
                arrived = tl.load(place + sender * sender_stride, mask=live, other=0, volatile=True)
            is_missing |= (arrived == empty).to(tl.int32)
            total += arrived.to(row_type, bitcast=True).to(tl.float32)
        missing = tl.max(is_missing, 0)
    # The reduction is over, so every thread has read.
    nothing = tl.full(own_bits.shape, empty, dtype=own_bits.dtype)
    for sender in tl.static_range(ranks):
        if sender != rank:
            tl.store(place + sender * sender_stride, nothing, mask=live)
    return total
