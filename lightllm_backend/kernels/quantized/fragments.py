# SPDX-License-Identifier: Apache-2.0
"""The column order in which a tensor core takes its left operand.

A thread of a warp multiplies, of each 16 columns, the columns 2t, 2t + 1, 2t + 8 and 2t + 9, t from 0 to 3. In each
chunk of 64 columns, a weight in this order has the 16 of thread 0 first, then those of thread 1, and so on; among them
the two of a pair are 16 bits apart, where a few operations on a word turn both into numbers of 16 bits.
"""

from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from lightllm_backend.kernels.quantized.weight import QuantizedWeight, pack_int4, unpack_int4

CHUNK = 64


@lru_cache
def fragment_columns(is_int4: bool) -> Tensor:
    """The column of a chunk that is at each place: [64], int64.

    Column = 16 * block + 8 * half + 2 * thread + second.
    """
    place = torch.arange(CHUNK)
    thread = place // 16
    if is_int4:  # the eight of a word: the two of a pair are four nibbles apart
        block = place // 8 % 2 * 2 + place // 2 % 2
        half, second = place % 2, place // 4 % 2
    else:
        block = place // 4 % 4
        half, second = place % 2, place // 2 % 2
    return 16 * block + 8 * half + 2 * thread + second


@lru_cache
def pair_columns(is_int4: bool) -> Tensor:
    """The column of a chunk that is at each place of PairedTokens: [64], int64.

    Of each 32 columns of int8, thread t multiplies the columns 4t to 4t + 3 and those 16 further. They meet the even
    digits of a word of int4, and the odd ones.
    """
    if not is_int4:
        return fragment_columns(is_int4=False)
    place = torch.arange(CHUNK)  # 32 * word + 16 * half + 4 * thread + byte
    word, half, thread, byte = place // 32, place // 16 % 2, place // 4 % 4, place % 4
    return 16 * (2 * word + byte % 2) + 8 * half + 2 * thread + byte // 2


def into_fragments(weight: QuantizedWeight) -> QuantizedWeight:
    """Reorder the values, in place, some rows at a time; in_features must be a multiple of 64."""
    columns = fragment_columns(weight.is_int4).to(weight.values.device)
    step = max(1, (1 << 24) // weight.shape[1])
    for first in range(0, len(weight.values), step):
        rows = weight.values[first : first + step]
        numbers = unpack_int4(rows) if weight.is_int4 else rows.view(torch.uint8)
        numbers = numbers.view(len(rows), -1, CHUNK).index_select(2, columns).flatten(1)
        rows.copy_(pack_int4(numbers) if weight.is_int4 else numbers.view(rows.dtype))
    return replace(weight, in_fragments=True)
