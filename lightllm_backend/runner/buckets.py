# SPDX-License-Identifier: Apache-2.0
"""Which shapes of steps are captured as CUDA graphs, and which of them a batch takes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lightllm_backend.router.batch import Batch
from lightllm_backend.runner.device_batch import Bucket

# Of a fast GPU and a fast host, so that others, which need graphs for fewer tokens, have at least those.
_FLOPS = 600e12
_LAUNCH_SECONDS_PER_LAYER = 350e-6
_LEAST_TOKENS, _MOST_TOKENS = 256, 2048

_PROMPT_TOKENS = (16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
# Prompts beside each other in a short step; one of so few costs no more than one of a single prompt.
_MOST_PREFILLS = 16
# A step of many decodes gains nothing from buckets for a handful of prompt tokens.
_DECODES_PER_PROMPT_TOKEN = 8


def batch_size_buckets(largest: int) -> list[int]:
    """The batch sizes that are captured: close together where steps are short, at most an eighth apart beyond 64."""
    sizes = [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64]
    while sizes[-1] < largest:
        sizes.append(sizes[-1] + max(8, sizes[-1] // 8 // 8 * 8))
    return _up_to(largest, sizes)


def graph_tokens(num_layers: int, num_weights: int) -> int:
    """Up to how many tokens a step that prefills is captured: beyond, to compute takes longer than to launch.

    num_weights: numbers in a rank's weights; each costs a multiplication and an addition a token.
    """
    tokens = num_layers * _LAUNCH_SECONDS_PER_LAYER * _FLOPS / (2 * num_weights)
    return min(max(-(-int(tokens) // 128) * 128, _LEAST_TOKENS), _MOST_TOKENS)


def step_buckets(num_rows: int, batch_max_tokens: int, most_tokens: int) -> list[Bucket]:
    """Decodes alone, up to `num_rows`, and with prompts beside them while both are at most `most_tokens`."""
    decode_sizes = [0, 8, 32, 64, 96, *range(128, 512, 64), *range(512, num_rows + 128, 128)]
    prompt_sizes = _up_to(batch_max_tokens, _PROMPT_TOKENS)
    mixed = [
        Bucket(decodes, tokens, min(tokens, _MOST_PREFILLS, num_rows))
        for decodes in _up_to(num_rows, decode_sizes)
        for tokens in prompt_sizes
        if decodes + tokens <= most_tokens and decodes <= tokens * _DECODES_PER_PROMPT_TOKEN
    ]
    return [Bucket(size) for size in batch_size_buckets(num_rows)] + mixed


class BucketChoice:
    """Finds the bucket with the fewest tokens that a batch fits, which is the same on every rank."""

    def __init__(self, buckets: Sequence[Bucket]) -> None:
        self.buckets = sorted(buckets, key=lambda bucket: (bucket.tokens, bucket.prompt_tokens))
        self._sizes = np.array(self.buckets)

    def __call__(self, batch: Batch) -> Bucket | None:
        """None: there is none."""
        fits = (self._sizes >= Bucket.of(batch)).all(1)
        index = int(fits.argmax())
        return self.buckets[index] if fits[index] else None


def _up_to(largest: int, sizes: Sequence[int]) -> list[int]:
    """The sizes below the largest, and the largest itself where there would be a greater one."""
    below = [size for size in sizes if size < largest]
    return [*below, largest] if len(below) < len(sizes) else below
