# SPDX-License-Identifier: Apache-2.0
"""RotaryEmbedding: the cosines and sines by which a step's queries and keys turn."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightllm_backend.kernels.attention.step_memo import StepMemo
from lightllm_backend.models.rope import Rope


class Rotation(NamedTuple):
    """The rotary embeddings of one step, which all layers with the same Rope share."""

    cos: Tensor  # [tokens, pairs of dimensions that turn] float32
    sin: Tensor
    memos: dict[int, StepMemo]  # by layer group: what kernels derive from them and from the step

    @classmethod
    def none(cls, positions: Tensor) -> Rotation:
        """No dimension turns."""
        unrotated = positions.new_empty((len(positions), 0), dtype=torch.float32)
        return cls(unrotated, unrotated, {})


class RotaryEmbedding:
    """Cosines and sines by position, computed once for all layers with the same Rope.

    A table has them for each position; that of longrope once more for the positions of long sequences. Dynamic RoPE
    stretches the base by the length of the sequence, so each token has frequencies of its own; a table has those for
    each length beyond the original one.
    """

    def __init__(self, rope: Rope, max_length: int, device: torch.device) -> None:
        self.rope = rope
        self.original = rope.original_max_positions
        self.is_dynamic = rope.rope_type == "dynamic"
        self.is_long = rope.rope_type == "longrope" and max_length > self.original
        if self.is_dynamic:
            self.frequencies = dynamic_frequencies(rope, max_length).to(device)
            return
        short = min(self.original, max_length) if rope.rope_type == "longrope" else max_length
        angles = torch.arange(short, dtype=torch.float32)[:, None] * rotary_frequencies(rope)
        if self.is_long:
            long_angles = torch.arange(max_length, dtype=torch.float32)[:, None] * rotary_frequencies(rope, True)
            angles = torch.cat((angles, long_angles))
        # Side by side, so that one gather reads both.
        self.table = torch.stack((angles.cos(), angles.sin()), 1).mul_(rope.attention_factor).to(device)

    def __call__(self, positions: Tensor, rotary_lengths: Tensor) -> Rotation:
        """The rotation of tokens at `positions` [t] int32 of sequences with `rotary_lengths` [t] int32 (StepInput)."""
        if self.rope.dim == 0:
            return Rotation.none(positions)
        if self.is_dynamic:
            index = (rotary_lengths - self.original).clamp_min(0)
            angles = positions[:, None] * self.frequencies.index_select(0, index)
            return Rotation(angles.cos(), angles.sin(), {})
        if self.is_long:
            positions = torch.where(rotary_lengths > self.original, positions + self.original, positions)
        cos, sin = self.table.index_select(0, positions).unbind(1)
        return Rotation(cos, sin, {})


def rotary_frequencies(rope: Rope, is_long: bool = False) -> Tensor:
    """The angle by which each pair of dimensions turns per position, [pairs] float32; `is_long`: see longrope."""
    frequencies = _inverse_frequencies(rope.theta, rope.dim)
    if rope.rope_type == "linear":
        frequencies = frequencies / rope.factor
    elif rope.rope_type == "llama3":
        # Slow down frequencies with few turns over the original context, keep those with many, and blend the others.
        turns = rope.original_max_positions * frequencies / (2 * math.pi)
        kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        frequencies = torch.lerp(frequencies / rope.factor, frequencies, kept.clamp(0, 1))
    elif rope.rope_type == "yarn":
        frequencies = torch.lerp(frequencies / rope.factor, frequencies, _kept_by_yarn(rope))
    elif rope.rope_type == "longrope":
        factors = rope.long_factors if is_long else rope.short_factors
        frequencies = frequencies / torch.tensor(factors, dtype=torch.float64)
    return frequencies.float()


def _kept_by_yarn(rope: Rope) -> Tensor:
    """How much of its own frequency each pair of dimensions keeps, [pairs] from 1 to 0.

    As for llama3, but the blend is linear in the pair's index: from the pair that turns beta_fast times over the
    original positions to the one that turns beta_slow times.
    """

    def pair_that_turns(times: float) -> float:
        return rope.dim * math.log(rope.original_max_positions / (times * 2 * math.pi)) / (2 * math.log(rope.theta))

    first, last = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rope.dim - 1)
    pairs = torch.arange(0, rope.dim // 2, dtype=torch.float64)
    return 1 - ((pairs - first) / (last - first or 0.001)).clamp(0, 1)


def dynamic_frequencies(rope: Rope, max_length: int) -> Tensor:
    """The rotary frequencies for each length from the original one to `max_length`, [lengths, pairs] float32."""
    original = rope.original_max_positions
    length = torch.arange(original, max(max_length, original) + 1, dtype=torch.float64)
    stretch = (rope.factor * length / original - (rope.factor - 1)) ** (rope.dim / (rope.dim - 2))
    return _inverse_frequencies(rope.theta * stretch[:, None], rope.dim).float()


def _inverse_frequencies(base: float | Tensor, dim: int) -> Tensor:
    """[..., pairs] float64."""
    return 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
