# SPDX-License-Identifier: Apache-2.0
"""Which shapes of steps are captured as CUDA graphs, and which of them a batch takes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lightllm_backend.router.batch import Batch
from lightllm_backend.runner.step_arrays import Bucket

# A fast GPU, and what it takes to launch a layer's kernels one by one (0.75 to 1.2 ms on a host of 2026).
_FLOPS = 600e12
_LAUNCH_SECONDS_PER_LAYER = 1e-3
_MIN_TOKENS, _MAX_TOKENS = 256, 2048

# Of steps that prefill; beyond 512 as far apart as the tiles of matrix products, which compute whole ones.
_TOKENS = (16, 32, 48, 64, 96, 128, 192, 256, 320, 384, 448, *range(512, _MAX_TOKENS + 1, 128))
# Prompts beside each other in such a step.
_MAX_PREFILLS = 32
# Among how many sequences decode attention divides the GPU; where many may decode, one is not cut into parts.
_DECODES = (0, 8, 32, 128)


def batch_size_buckets(largest: int) -> list[int]:
    """The batch sizes that are captured: close together where steps are short, then an eighth apart, then 64.

    All multiples of 128 are among them: products compute tiles of 64 or 128 tokens, so one token more costs much.
    """
    sizes = [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64]
    while sizes[-1] < largest:
        sizes.append(sizes[-1] + min(64, 1 << (sizes[-1].bit_length() - 4)))
    return _up_to(largest, sizes)


def graph_tokens(num_layers: int, num_weights: int) -> int:
    """Up to how many tokens a step that prefills is captured: beyond, to compute takes longer than to launch.

    num_weights: numbers in a rank's weights; each costs a multiplication and an addition a token.
    """
    tokens = num_layers * _LAUNCH_SECONDS_PER_LAYER * _FLOPS / (2 * num_weights)
    return min(max(-(-int(tokens) // 128) * 128, _MIN_TOKENS), _MAX_TOKENS)


def step_buckets(num_rows: int, batch_max_tokens: int, max_graph_tokens: int) -> list[Bucket]:
    """Decodes alone, up to `num_rows`, and with prompts among at most `max_graph_tokens` tokens."""
    mixed = [
        Bucket(tokens, decodes, min(tokens, _MAX_PREFILLS, num_rows))
        for tokens in _up_to(min(max_graph_tokens, num_rows + batch_max_tokens), _TOKENS)
        for decodes in sorted({*_up_to(min(num_rows, tokens - 1), _DECODES), min(num_rows, tokens - 1)})
    ]
    return [Bucket(size, size) for size in batch_size_buckets(num_rows)] + mixed


class BucketChoice:
    """Finds the bucket with the fewest tokens that a batch fits, which is the same on every rank.

    Buckets with room for prompts are for batches that have some: they launch more kernels.
    """

    def __init__(self, buckets: Sequence[Bucket]) -> None:
        self.buckets = sorted(buckets, key=lambda bucket: (bucket.tokens, bucket.prefills, bucket.decodes))
        self._sizes = np.array(self.buckets)

    def __call__(self, batch: Batch) -> Bucket | None:
        """None: there is none."""
        needed = Bucket.of(batch)
        fits = (self._sizes >= needed).all(1) & ((self._sizes[:, 2] > 0) == (needed.prefills > 0))
        index = int(fits.argmax())
        return self.buckets[index] if fits[index] else None


def _up_to(largest: int, sizes: Sequence[int]) -> list[int]:
    """The sizes below the largest, and the largest itself where there would be a greater one."""
    below = [size for size in sizes if size < largest]
    return [*below, largest] if len(below) < len(sizes) else below
