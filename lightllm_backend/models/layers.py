# SPDX-License-Identifier: Apache-2.0
"""What models are made of: the input of a step, and the layers, each on this rank's part of the weights.

A forward pass reads nothing back from the device and its shapes depend on shapes alone, so that a whole decode step
can be captured in a CUDA graph. Tensors of tokens are packed without padding, [tokens, ...].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lightllm_backend.kernels.attention.whole_prompt_tiles import WholePromptTiles
from lightllm_backend.kernels.interface import Kernels
from lightllm_backend.models.errors import ModelError
from lightllm_backend.models.model_config import ModelConfig
from lightllm_backend.models.weights import HasWeights, WeightSlot
from lightllm_backend.parallel import TensorParallel


class KVLayer(NamedTuple):
    """One layer's part of the KV pool."""

    k: Tensor  # [slots, kv_heads, head_dim]
    v: Tensor
    # Of an int8 pool: what the values of K and of V are multiples of, [slots, kv_heads, 2].
    scales: Tensor | None = None


@dataclass(frozen=True)
class StepInput:
    """What a model needs of one step: t tokens of n sequences. Those that decode come first, one token each.

    There may be fewer of either than there is room for: sequences without context are padding.
    """

    input_ids: Tensor  # [t] int32
    positions: Tensor  # [t] int32
    rotary_lengths: Tensor  # [t] int32, max(prompt length, position + 1): what dynamic RoPE scales by
    slots: Tensor  # [t] int32, where the pool takes each token's K and V; -1 is padding
    rows: Tensor  # [n] int32, of req_to_token
    context_lengths: Tensor  # [n] int32, cached and new tokens
    query_starts: Tensor  # [n_prefill + 1] int32, the first tokens of the prefill chunks, and behind the last
    num_decodes: int  # with padding; the other sequences prefill
    max_context_length: int
    last_tokens: Tensor | None  # [m] int64, the tokens whose logits are wanted; None: all, in their order
    req_to_token: Tensor  # [table rows, max length] int32, the slot of each position
    kv_layers: Sequence[KVLayer]
    whole_prompts: WholePromptTiles | None = None  # those without cached tokens, where the host knows them


class CausalLM(HasWeights, Protocol):
    """What the runner asks of a model, and what loading does."""

    num_kv_heads: int  # on this rank
    head_dim: int

    def __init__(
        self,
        config: ModelConfig,
        kernels: Kernels,
        parallel: TensorParallel,
        dtype: torch.dtype,
        device: torch.device,
        max_length: int,
    ) -> None:
        """Allocate the parameters; their values come with load_weights or dummy_weights."""

    def forward(self, step: StepInput) -> Tensor:
        """Write the new K and V into the pool, and return the logits [m, vocab] of `step.last_tokens`."""


@dataclass(frozen=True)
class Placement:
    """What a rank's tensors are made as, which part of the model they are, and what computes with them."""

    parallel: TensorParallel
    dtype: torch.dtype
    device: torch.device
    kernels: Kernels  # as kernels.select() chooses for the device

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def share(self, what: str, count: int) -> int:
        """This rank's share of `count` things, which must be the same on each rank."""
        if count % self.parallel.size != 0:
            raise ModelError(f"{what} is {count}, which tp = {self.parallel.size} does not divide")
        return count // self.parallel.size

    def kv_share(self, count: int) -> tuple[int, int]:
        """This rank's number of `count` KV heads and the first of them; ranks share one where there are too few."""
        rank, size = self.parallel.rank, self.parallel.size
        if count % size != 0 and size % count != 0:
            raise ModelError(f"num_key_value_heads is {count}, which must divide tp = {size} or be divided by it")
        return max(1, count // size), rank * count // size

    def vocabulary_share(self, vocab_size: int) -> tuple[int, int, int]:
        """This rank's rows of a table padded for equal shares, the first of them, and how many of them are tokens.

        Shares are multiples of 8 rows, since matrix products on GPUs are slow where rows of the result lie unaligned.
        """
        if self.parallel.size == 1:
            return vocab_size, 0, vocab_size
        rows = -(-vocab_size // (8 * self.parallel.size)) * 8
        start = min(rows * self.parallel.rank, vocab_size)
        return rows, start, min(rows, vocab_size - start)


@dataclass(frozen=True)
class Part:
    """A checkpoint's matrix within a fused one: of its `full_rows` this rank holds `rows`, from `start` on."""

    name: str
    full_rows: int
    rows: int
    start: int


class ColumnLinear:
    """One matrix product for several matrices of the checkpoint, each split over the ranks by its output features."""

    def __init__(self, parts: Sequence[Part], in_features: int, bias: bool, place: Placement) -> None:
        rows = sum(part.rows for part in parts)
        self.parts = parts
        self.weight = place.empty(rows, in_features)
        self.bias = place.empty(rows) if bias else None
        self.kernels = place.kernels

    def __call__(self, x: Tensor) -> Tensor:
        return self.kernels.linear(x, self.weight, self.bias)

    def gated(self, x: Tensor) -> Tensor:
        """silu(x * first matrix) * (x * second matrix), for two of them alike."""
        return self.kernels.gated_linear(x, self.weight, self.bias)

    def weight_map(self) -> dict[str, WeightSlot]:
        slots, first = {}, 0
        for part in self.parts:
            rows = slice(first, first + part.rows)
            shape = (part.full_rows, self.weight.shape[1])
            slots[f"{part.name}.weight"] = WeightSlot(self.weight[rows], shape, 0, part.start)
            if self.bias is not None:
                slots[f"{part.name}.bias"] = WeightSlot(self.bias[rows], shape[:1], 0, part.start)
            first += part.rows
        return slots


class RowLinear:
    """A matrix split over the ranks by its input features; the ranks' products are summed, here or by whoever is next.

    The result goes to a norm, which takes it in parts as well: it may be [parts, tokens, out_features], see
    Kernels.linear_splits.
    """

    def __init__(self, name: str, in_features: int, out_features: int, bias: bool, place: Placement) -> None:
        self.name = name
        self.in_features = in_features
        self.kernels = place.kernels
        self.parallel = place.parallel
        self.weight = place.empty(out_features, place.share(f"{name}'s number of inputs", in_features))
        self.bias = place.empty(out_features) if bias else None

    def __call__(self, x: Tensor) -> Tensor:
        return self._parts(x) if self.parallel.size == 1 else self.parallel.all_reduce(self._whole(x))

    def unsummed(self, x: Tensor) -> Tensor:
        """This rank's product alone, for a norm that has it summed; in parts where they go through Lamport buffers."""
        buffers = self.parallel.lamport_buffers(x.shape[0], self.weight.shape[0])
        return self._parts(x) if self.parallel.size == 1 or buffers else self._whole(x)

    def _parts(self, x: Tensor) -> Tensor:
        return self.kernels.linear_splits(x, self.weight, self._added_bias)

    def _whole(self, x: Tensor) -> Tensor:
        buffer = self.parallel.product_buffer(x.shape[0], self.weight.shape[0], x.dtype)
        return self.kernels.linear(x, self.weight, self._added_bias, buffer)

    @property
    def _added_bias(self) -> Tensor | None:
        """Each rank holds the bias, and one of them adds it."""
        return self.bias if self.parallel.rank == 0 else None

    def weight_map(self) -> dict[str, WeightSlot]:
        out_features, share = self.weight.shape
        shape = (out_features, self.in_features)
        slots = {f"{self.name}.weight": WeightSlot(self.weight, shape, 1, share * self.parallel.rank)}
        if self.bias is not None:
            slots[f"{self.name}.bias"] = WeightSlot.whole(self.bias)
        return slots


class RotaryEmbedding:
    """Cosines and sines of rotary position embeddings, float32, gathered once a step for all layers.

    Dynamic scaling stretches the base by the length of the sequence, so there each token has its own frequencies: a
    table has them for each length beyond the original one.
    """

    def __init__(self, config: ModelConfig, max_length: int, device: torch.device) -> None:
        self.first_length = config.max_positions
        self.is_dynamic = config.rope_scaling.rope_type == "dynamic"
        if self.is_dynamic:
            self.frequencies = dynamic_frequencies(config, max_length).to(device)
        else:
            angles = torch.arange(max_length, dtype=torch.float32)[:, None] * rotary_frequencies(config)
            # Side by side, so that one gather has both.
            self.table = torch.stack((angles.cos(), angles.sin()), 1).to(device)

    def __call__(self, positions: Tensor, rotary_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [tokens, head_dim / 2]."""
        if not self.is_dynamic:
            cos, sin = self.table.index_select(0, positions).unbind(1)
            return cos, sin
        index = (rotary_lengths - self.first_length).clamp_min(0)
        angles = positions[:, None] * self.frequencies.index_select(0, index)
        return angles.cos(), angles.sin()


def rotary_frequencies(config: ModelConfig) -> Tensor:
    """The angle by which each pair of dimensions turns from one position to the next, [head_dim / 2] float32."""
    scaling = config.rope_scaling
    frequencies = _inverse_frequencies(config.rope_theta, config.head_dim)
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    if scaling.rope_type == "llama3":
        # Turns over the original context: few are slowed by the factor, many are kept, between them it is blended.
        turns = scaling.original_max_positions * frequencies / (2 * math.pi)
        kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        return torch.lerp(frequencies / scaling.factor, frequencies, kept.clamp(0, 1))
    return frequencies


def dynamic_frequencies(config: ModelConfig, max_length: int) -> Tensor:
    """The same for each length from the original one to `max_length`, [lengths, head_dim / 2] float32."""
    longest = max(max_length, config.max_positions)
    length = torch.arange(config.max_positions, longest + 1, dtype=torch.float64)
    factor, dim = config.rope_scaling.factor, config.head_dim
    stretch = (factor * length / config.max_positions - (factor - 1)) ** (dim / (dim - 2))
    return _inverse_frequencies(config.rope_theta * stretch[:, None], dim)


def _inverse_frequencies(base: float | Tensor, head_dim: int) -> Tensor:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    return (1.0 / base**exponents).float()


def alibi_slopes(num_heads: int) -> Tensor:
    """By how much each head favours a key for each position that it is later, [num_heads] float32.

    A geometric series for a power of two; heads beyond the last power of two take every other slope of the next one's.
    """
    power = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * (head + 1) / power) for head in range(power)]
    slopes += [2.0 ** (-4 * (2 * head + 1) / power) for head in range(num_heads - power)]
    return torch.tensor(slopes, dtype=torch.float32)


class PoolAttention:
    """Attention of a step's tokens over the KV pool, into which their K and V go first; of this rank's heads."""

    def __init__(self, kernels: Kernels, head_dim: int, window: int = 0, alibi_slopes: Tensor | None = None) -> None:
        self.kernels = kernels
        self.scale = head_dim**-0.5
        self.window = window
        self.alibi_slopes = alibi_slopes

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, kv: KVLayer, step: StepInput
    ) -> Tensor:
        """`q`, `k` and `v` are [tokens, heads, head_dim]; the output is [tokens, heads * head_dim]."""
        decodes = step.num_decodes
        out = q.new_empty(q.shape)
        if decodes > 0:
            # The last of them may belong to a prompt, and are left alone then.
            self.kernels.token_attention(
                q[:decodes], k[:decodes], v[:decodes], cos[:decodes], sin[:decodes], step.slots[:decodes], kv.k, kv.v,
                step.req_to_token, step.rows[:decodes], step.context_lengths[:decodes], step.max_context_length,
                self.scale, self.alibi_slopes, self.window, kv.scales, out[:decodes],
            )  # fmt: skip
        if len(step.query_starts) > 1:
            self.kernels.rotary_kv_write(q, k, v, cos, sin, step.slots, kv.k, kv.v, kv.scales, step.query_starts)
            self.kernels.prefill_attention(
                q, k, v, kv.k, kv.v, step.req_to_token, step.rows[decodes:], step.query_starts,
                step.context_lengths[decodes:], self.scale, self.alibi_slopes, self.window, kv.scales,
                step.whole_prompts, out,
            )  # fmt: skip
        return out.flatten(1)


@dataclass(frozen=True)
class AttentionOptions:
    """In what the attention of one architecture, or of one of its layers, differs from another's."""

    qkv_bias: bool = False
    output_bias: bool = False
    window: int = 0  # how many positions a query sees, its own among them; 0: all


class Attention:
    """Self-attention over the KV pool: fused q, k, v; rotary embedding; output projection. Heads are split by rank."""

    def __init__(self, config: ModelConfig, options: AttentionOptions, place: Placement) -> None:
        self.head_dim = config.head_dim
        self.attend = PoolAttention(place.kernels, config.head_dim, options.window)
        self.num_heads = place.share("num_attention_heads", config.num_heads)
        self.num_kv_heads, first_kv_head = place.kv_share(config.num_kv_heads)
        shares = (
            ("q_proj", config.num_heads, self.num_heads, self.num_heads * place.parallel.rank),
            ("k_proj", config.num_kv_heads, self.num_kv_heads, first_kv_head),
            ("v_proj", config.num_kv_heads, self.num_kv_heads, first_kv_head),
        )
        parts = [
            Part(f"self_attn.{name}", *(heads * config.head_dim for heads in (full, share, start)))
            for name, full, share, start in shares
        ]
        self.qkv = ColumnLinear(parts, config.hidden_size, options.qkv_bias, place)
        inner = config.num_heads * config.head_dim
        self.output = RowLinear("self_attn.o_proj", inner, config.hidden_size, options.output_bias, place)

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, kv: KVLayer, step: StepInput) -> Tensor:
        heads = self.qkv(x).view(x.shape[0], -1, self.head_dim)
        q, k, v = torch.split(heads, [self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        return self.output.unsummed(self.attend(q, k, v, cos, sin, kv, step))

    def weight_map(self) -> dict[str, WeightSlot]:
        return self.qkv.weight_map() | self.output.weight_map()
