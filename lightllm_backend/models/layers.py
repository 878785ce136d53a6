# SPDX-License-Identifier: Apache-2.0
"""Attention, with this rank's part of the weights, and StepInput, which a model computes.

A forward pass reads nothing back from the device, and its shapes depend on the shapes of its input alone, so that CUDA
graphs can capture it. Tensors of tokens are packed without padding: [tokens, ...].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightllm_backend.kernels.attention.head_norm import HeadNorm
from lightllm_backend.kernels.attention.whole_prompt_tiles import WholePromptTiles
from lightllm_backend.kernels.interface import Kernels
from lightllm_backend.kernels.quantized.rounded_tokens import Activations
from lightllm_backend.kernels.quantized.weight import Weight
from lightllm_backend.models.linear import ColumnLinear, Part, RowLinear, fused_parts
from lightllm_backend.models.model_config import ModelConfig
from lightllm_backend.models.norm_weight import NormWeight
from lightllm_backend.models.placement import Placement
from lightllm_backend.models.rotary import Rotation
from lightllm_backend.models.weights import WeightSlot

# What the last layer leaves: its output [tokens, hidden_size], or parts of it [parts, tokens, hidden_size] for the norm
# to sum, and the residual [tokens, hidden_size] that the norm adds to it.
HiddenStates = tuple[Tensor, Tensor]


class KVLayer(NamedTuple):
    """One layer's part of the KV pool."""

    k: Tensor  # [slots, kv_heads, head_dim]
    v: Tensor
    scales: Tensor | None = None  # of an int8 pool: the scales of K and V, [slots, kv_heads, 2] float16
    group: int = 0  # its layer group: which of StepInput.groups has its slots


class GroupInput(NamedTuple):
    """Where the K and V of a step are in the layers of one group (kv_pool/layer_groups.py)."""

    slots: Tensor  # [t] int32, for each token's K and V; -1 is padding
    req_to_token: Tensor  # [table rows, max length] int32, the slot of each position that a query sees


@dataclass(frozen=True)
class StepInput:
    """The input of one step: t tokens of n sequences. Sequences that decode come first, with one token each.

    Sequences without context are padding, among decodes as among prefills.
    """

    input_ids: Tensor  # [t] int32
    positions: Tensor  # [t] int32
    rotary_lengths: Tensor  # [t] int32, max(tokens prefilled at first, position + 1): by which some RoPE changes
    rows: Tensor  # [n] int32, of each group's req_to_token
    context_lengths: Tensor  # [n] int32, cached plus new tokens
    query_starts: Tensor  # [n_prefill + 1] int32, the first token of each prompt chunk, and the end of the last
    num_decodes: int  # padding included; the other sequences prefill
    max_context_length: int
    last_tokens: Tensor | None  # [m] int64, the tokens whose logits to compute; None: all, in order
    groups: Sequence[GroupInput]  # of the layers, by KVLayer.group
    kv_layers: Sequence[KVLayer]
    whole_prompts: WholePromptTiles | None = None  # the prompts without cached tokens, if the host knows them


def alibi_slopes(num_heads: int) -> Tensor:
    """ALiBi slopes: the score penalty per position of distance, [num_heads] float32.

    For a power of two, the slopes are a geometric series. Heads beyond the last power of two take every other slope of
    the next power's series.
    """
    power = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * (head + 1) / power) for head in range(power)]
    slopes += [2.0 ** (-4 * (2 * head + 1) / power) for head in range(num_heads - power)]
    return torch.tensor(slopes, dtype=torch.float32)


class PoolAttention:
    """Writes the K and V of a step's tokens into the KV pool, and attends over the pool. For this rank's heads."""

    def __init__(
        self,
        kernels: Kernels,
        scale: float,
        window: int = 0,
        alibi_slopes: Tensor | None = None,
        norm: HeadNorm | None = None,
        soft_cap: float = 0.0,
    ) -> None:
        self.kernels = kernels
        self.scale = scale
        self.window = window
        self.alibi_slopes = alibi_slopes
        self.norm = norm
        self.soft_cap = soft_cap

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation, kv: KVLayer, step: StepInput) -> Tensor:
        """Take q, k, v [tokens, heads, head_dim]; return [tokens, heads * head_dim]."""
        decodes, (slots, req_to_token) = step.num_decodes, step.groups[kv.group]
        cos, sin, memos = rotation
        memo = memos.setdefault(kv.group, {})
        out = q.new_empty(q.shape)
        if decodes > 0:
            # The last of these tokens may belong to a prompt; the kernel leaves them alone.
            is_all = len(q) == len(step.rows) == decodes

            def first(tensor: Tensor) -> Tensor:
                return tensor if is_all else tensor[:decodes]

            self.kernels.token_attention(
                first(q), first(k), first(v), first(cos), first(sin), first(slots), kv.k, kv.v, req_to_token,
                first(step.rows), first(step.context_lengths), step.max_context_length, self.scale, self.alibi_slopes,
                self.window, kv.scales, first(out), memo, self.norm, self.soft_cap,
            )  # fmt: skip
        if len(step.query_starts) > 1:
            self.kernels.rotary_kv_write(
                q, k, v, cos, sin, slots, kv.k, kv.v, kv.scales, step.query_starts, memo, self.norm
            )
            self.kernels.prefill_attention(
                q, k, v, kv.k, kv.v, req_to_token, step.rows[decodes:], step.query_starts,
                step.context_lengths[decodes:], self.scale, self.alibi_slopes, self.window, kv.scales,
                step.whole_prompts, out, memo, self.soft_cap,
            )  # fmt: skip
        return out.flatten(1)


@dataclass(frozen=True)
class AttentionOptions:
    """The differences between the attention of architectures and of their layers."""

    qkv_bias: bool = False
    output_bias: bool = False
    window: int = 0  # positions that a query sees, its own included; 0: all
    is_fused: bool = False  # the checkpoint has q, k and v in one matrix
    has_head_norm: bool = False  # an RMS norm of each head's query and key, before they are rotated
    norms_from_one: bool = False  # see NormWeight


class Attention:
    """Self-attention over the KV pool: fused q, k, v, norm of heads, rotary embedding, output projection.

    Ranks split the heads.
    """

    def __init__(self, config: ModelConfig, options: AttentionOptions, place: Placement) -> None:
        self.head_dim = config.head_dim
        self.head_norms: list[NormWeight] = []
        norm = None
        if options.has_head_norm:
            names = ("self_attn.q_norm", "self_attn.k_norm")
            self.head_norms = [NormWeight(n, config.head_dim, place, options.norms_from_one) for n in names]
            q_norm, k_norm = (weight.value for weight in self.head_norms)
            norm = HeadNorm(q_norm, k_norm, config.norm_eps)
        scale = config.attention_scale or config.head_dim**-0.5
        soft_cap = config.attention_softcap or 0.0
        self.attend = PoolAttention(place.kernels, scale, options.window, norm=norm, soft_cap=soft_cap)
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
        if options.is_fused:
            parts = fused_parts("self_attn.qkv_proj", parts)
        self.qkv = ColumnLinear(parts, config.hidden_size, options.qkv_bias, place)
        inner = config.num_heads * config.head_dim
        self.output = RowLinear("self_attn.o_proj", inner, config.hidden_size, options.output_bias, place)

    @property
    def reader(self) -> Weight:
        return self.qkv.weight

    def __call__(self, x: Activations, rotation: Rotation, kv: KVLayer, step: StepInput) -> Tensor:
        heads = self.qkv(x).view(x.shape[0], -1, self.head_dim)
        q, k, v = torch.split(heads, [self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        return self.output.unsummed(self.attend(q, k, v, rotation, kv, step))

    def weight_map(self) -> dict[str, WeightSlot]:
        slots = self.qkv.weight_map()
        for weight in self.head_norms:
            slots |= weight.weight_map()
        return slots | self.output.weight_map()
