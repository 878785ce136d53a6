# SPDX-License-Identifier: Apache-2.0
"""Buckets: the step shapes captured as CUDA graphs, and the choice of one for a batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lightllm_backend.router.batch import Batch
from lightllm_backend.runner.step_arrays import Bucket

# bf16 operations per second of a fast GPU, rounded down, of which it does twice as many in 8 bits; perf.hardware_limits
# measures them.
_FLOPS = 600e12
# The host's time to launch the kernels of a layer one by one: 0.75 to 1.2 ms alone, 1.4 to 2.0 ms beside a server and
# its clients, measured on hosts of 2026.
_LAUNCH_SECONDS_PER_LAYER = 2e-3
# Limits of `graph_tokens`: each graph takes start-up time, and small models would capture without end.
_MIN_TOKENS, _MAX_TOKENS = 256, 3072
# A step with a longer prompt is not replayed: the kernel for whole prompts, whose lengths a graph does not know, is
# faster, and attention takes enough of the step that launching it is not what the step waits for.
_LONG_PROMPT = 2048

# Token counts captured with prefills. From 512 on, they are one tile of a matrix product (128 tokens) apart.
_TOKENS = (16, 32, 48, 64, 96, 128, 192, 256, 320, 384, 448, *range(512, _MAX_TOKENS + 1, 128))
# Prompts in a captured step. Unused ones are nearly free, so one count is captured, not several.
_MAX_PREFILLS = 32
# Decode counts captured with prefills. Attention splits contexts by the count that a graph has room for, so a graph
# with room for many decodes would not split the contexts of a few.
_DECODES = (0, 8, 32, 128)


def batch_size_buckets(largest: int) -> list[int]:
    """The captured decode counts: close together where steps are short, then an eighth apart, then 64 apart.

    They contain all multiples of 128: products compute tiles of 64 or 128 tokens, so one more token can cost a tile.
    """
    sizes = [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64]
    while sizes[-1] < largest:
        sizes.append(sizes[-1] + min(64, 1 << (sizes[-1].bit_length() - 4)))
    return _up_to(largest, sizes)


def graph_tokens(num_layers: int, num_weights: int, in_8_bits: bool = False) -> int:
    """The most tokens for which a step with prefills is captured: a larger step computes longer than it launches.

    num_weights: elements of a rank's weights; each costs a multiplication and an addition per token.
    in_8_bits: activations enter the layers' products in 8 bits.
    """
    flops = _FLOPS * (2 if in_8_bits else 1)
    tokens = num_layers * _LAUNCH_SECONDS_PER_LAYER * flops / (2 * num_weights)
    return min(max(-(-int(tokens) // 128) * 128, _MIN_TOKENS), _MAX_TOKENS)


def step_buckets(num_rows: int, batch_max_tokens: int, max_graph_tokens: int) -> list[Bucket]:
    """All buckets: decodes alone, up to `num_rows`, and mixed with prompts, up to `max_graph_tokens` tokens."""
    mixed = [
        Bucket(tokens, decodes, min(tokens, _MAX_PREFILLS, num_rows))
        for tokens in _up_to(min(max_graph_tokens, num_rows + batch_max_tokens), _TOKENS)
        for decodes in sorted({*_up_to(min(num_rows, tokens - 1), _DECODES), min(num_rows, tokens - 1)})
    ]
    return [Bucket(size, size) for size in batch_size_buckets(num_rows)] + mixed


class BucketChoice:
    """Finds the smallest bucket that a batch fits: the same one on every rank.

    A batch without prompts takes no bucket with room for prompts, which launches more kernels. One with a long prompt
    takes none.
    """

    def __init__(self, buckets: Sequence[Bucket]) -> None:
        self.buckets = sorted(buckets, key=lambda bucket: (bucket.tokens, bucket.prefills, bucket.decodes))
        self._sizes = np.array(self.buckets)

    def __call__(self, batch: Batch) -> Bucket | None:
        """The bucket, or None if the batch fits none."""
        needed = Bucket.of(batch)
        if needed.prefills > 0 and batch.lengths[needed.decodes :].max() > _LONG_PROMPT:
            return None
        fits = (self._sizes >= needed).all(1) & ((self._sizes[:, 2] > 0) == (needed.prefills > 0))
        index = int(fits.argmax())
        return self.buckets[index] if fits[index] else None


def _up_to(largest: int, sizes: Sequence[int]) -> list[int]:
    """The sizes below `largest`, and `largest` itself if any size reaches it."""
    below = [size for size in sizes if size < largest]
    return [*below, largest] if len(below) < len(sizes) else below
