# SPDX-License-Identifier: Apache-2.0
"""Plain PyTorch of the attention kernels; kernels/interface.py says what each function computes."""

from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from lightllm_backend.kernels.attention.head_norm import HeadNorm
from lightllm_backend.kernels.attention.kv_scales import MAX_KV_SCALE, MIN_KV_SCALE
from lightllm_backend.kernels.attention.step_memo import StepMemo, once
from lightllm_backend.kernels.attention.whole_prompt_tiles import WholePromptTiles
from lightllm_backend.kernels.norm.reference import rms_normed

# The elements of an attention bias that are built at a time.
_BIAS_ELEMENTS = 1 << 24

# With fewer keys than the numbers in a vector (16 with AVX-512), and without a mask, torch's attention on a CPU makes 0
# of scores that are all NaN, and a broken model looks sound (findings/short_attention_hides_nan.sh).
_FEWEST_UNMASKED_KEYS = 16


def rotary_kv_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    scales: Tensor | None = None,
    query_starts: Tensor | None = None,
    memo: StepMemo | None = None,
    norm: HeadNorm | None = None,
) -> None:
    def of_prompts() -> tuple[slice, _Turns, _Places]:
        first = 0 if query_starts is None else int(query_starts[0])
        return slice(first, None), _Turns.of(cos[first:], sin[first:]), _Places.of(slots[first:])

    part, turns, places = once(memo, "prompts' new tokens", of_prompts)
    q, k, v = q[part], k[part], v[part]
    queries, keys = _normed(q, k, norm)
    q.copy_(_rotate(queries, turns))
    written = _write(_rotate(keys, turns), v, places, k_pool, v_pool, scales)
    for tensor, values in zip((k, v), written, strict=True):
        if tensor is not values:
            tensor.copy_(values)


class _Places(NamedTuple):
    """Where new tokens go in the pool."""

    slots: Tensor  # int64, of those that are no padding
    live: Tensor | None  # which are no padding; None: all

    @classmethod
    def of(cls, slots: Tensor) -> "_Places":
        live = slots >= 0
        return cls(slots.long(), None) if bool(live.all()) else cls(slots[live].long(), live)

    def choose(self, values: Tensor) -> Tensor:
        return values if self.live is None else values[self.live]


def _write(
    k: Tensor, v: Tensor, places: _Places, k_pool: Tensor, v_pool: Tensor, scales: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Writes K, rotated, and V at their slots, and returns what was written."""
    slots = places.slots
    if scales is None:
        for values, pool in ((k, k_pool), (v, v_pool)):
            pool.index_copy_(0, slots, places.choose(values).to(pool.dtype))
        return k, v
    written = []
    for index, (values, pool) in enumerate(((k, k_pool), (v, v_pool))):
        quantized, scale = _quantize(values.float(), scales.dtype)
        pool[slots], scales[slots, :, index] = places.choose(quantized), places.choose(scale)
        written.append(quantized * scale.float().unsqueeze(-1))
    return written[0], written[1]


def _normed(q: Tensor, k: Tensor, norm: HeadNorm | None) -> tuple[Tensor, Tensor]:
    """Queries and keys [tokens, heads, head_dim], each head normed."""
    if norm is None:
        return q, k
    queries, keys = (rms_normed(x.flatten(0, 1), w, norm.eps).view(x.shape) for x, w in ((q, norm.q), (k, norm.k)))
    return queries, keys


class _Turns(NamedTuple):
    """Rotary embeddings as factors [tokens, 1, rotary_dim] of x, and of x with its halves exchanged."""

    own: Tensor
    exchanged: Tensor

    @classmethod
    def of(cls, cos: Tensor, sin: Tensor) -> "_Turns":
        return cls(torch.cat((cos, cos), -1).unsqueeze(1), torch.cat((-sin, sin), -1).unsqueeze(1))


def _rotate(x: Tensor, turns: _Turns) -> Tensor:
    """In float32."""
    rotary_dim = turns.own.shape[-1]
    if rotary_dim == 0:
        return x.float()
    turned = x[..., :rotary_dim].float()
    exchanged = turned.view(*turned.shape[:-1], 2, rotary_dim // 2).flip(-2).view(turned.shape)
    rotated = torch.addcmul(turned * turns.own, exchanged, turns.exchanged)
    return torch.cat((rotated, x[..., rotary_dim:].float()), -1) if rotary_dim < x.shape[-1] else rotated


def _quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`x` [tokens, heads, head_dim] as int8, and the scales [tokens, heads]. It is multiplied by the inverse of
    what the scale is rounded to."""
    largest = x.abs().amax(-1)
    scale = (largest * (1 / 127)).clamp(MIN_KV_SCALE, MAX_KV_SCALE)
    scale = torch.where(largest == 0, 1.0, scale).to(dtype)
    return (x * (1.0 / scale.float().unsqueeze(-1))).clamp(-127, 127).round().to(torch.int8), scale


def prefill_attention(
    q: Tensor,
    k: Tensor,  # noqa: ARG001 - the pool has it too
    v: Tensor,  # noqa: ARG001
    k_pool: Tensor,
    v_pool: Tensor,
    req_to_token: Tensor,
    rows: Tensor,
    query_starts: Tensor,
    context_lengths: Tensor,
    scale: float,
    alibi_slopes: Tensor | None = None,
    window: int = 0,
    scales: Tensor | None = None,
    whole_prompts: WholePromptTiles | None = None,  # noqa: ARG001 - says nothing new
    out: Tensor | None = None,
    memo: StepMemo | None = None,
    soft_cap: float = 0.0,
) -> Tensor:
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    bias_heads = 0 if alibi_slopes is None and soft_cap == 0 else q.shape[1]
    tables = req_to_token, rows, query_starts, context_lengths
    key = "prompts", window, bias_heads
    for prompts in once(memo, key, lambda: list(_prompts(*tables, window, bias_heads))):
        mask = None if prompts.is_plain else prompts.seen
        if alibi_slopes is not None:
            mask = _bias(prompts.position, prompts.seen, alibi_slopes)
        result = _attention(
            q[prompts.tokens].transpose(1, 2),
            _gather(k_pool, scales, 0, prompts.slots, q.dtype).transpose(1, 2),
            _gather(v_pool, scales, 1, prompts.slots, q.dtype).transpose(1, 2),
            mask,
            prompts.is_plain,
            scale,
            soft_cap,
        )
        out[prompts.tokens[prompts.live]] = result.transpose(1, 2)[prompts.live]
    return out


def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float, soft_cap: float
) -> Tensor:
    """scaled_dot_product_attention [sequences, heads, queries, head_dim], also with a soft cap, which needs a mask if
    queries differ in what they see."""
    group = q.shape[1] // k.shape[1]
    if soft_cap == 0:
        return functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=group > 1
        )
    at_once = max(1, _BIAS_ELEMENTS // (q[:, :, :1].numel() * k.shape[2] // q.shape[3]))
    if mask is not None and q.shape[2] > at_once:
        parts = zip(torch.split(q, at_once, 2), torch.split(mask, at_once, -2), strict=True)
        return torch.cat([_attention(part, k, v, seen, is_causal, scale, soft_cap) for part, seen in parts], 2)
    scores = torch.matmul(q, k.repeat_interleave(group, 1).transpose(2, 3)).float()
    scores = scores.mul_(scale / soft_cap).tanh_().mul_(soft_cap)
    if mask is not None:
        scores = scores.masked_fill_(~mask, -torch.inf) if mask.dtype == torch.bool else scores.add_(mask)
    return torch.matmul(scores.softmax(-1).to(v.dtype), v.repeat_interleave(group, 1))


class _Prompts(NamedTuple):
    """Prompt chunks that are computed together, padded to the longest."""

    tokens: Tensor  # [sequences, queries] int64; padding repeats token 0
    live: Tensor  # [sequences, queries] bool: no padding
    slots: Tensor  # [sequences, keys] int64
    position: Tensor  # [sequences, queries], of each query among the keys
    seen: Tensor  # [sequences, 1, queries, keys] bool
    is_plain: bool  # causal attention over nothing but these tokens, of which torch needs no mask


def _prompts(
    req_to_token: Tensor, rows: Tensor, query_starts: Tensor, context_lengths: Tensor, window: int, bias_heads: int
) -> Iterator[_Prompts]:
    starts, contexts = query_starts.tolist(), context_lengths.tolist()
    lengths = [end - start for start, end in pairwise(starts)]
    # What no query of a sequence sees is left out, as if the sequence began behind it.
    skipped = [max(0, c - n - window + 1) if window else 0 for c, n in zip(contexts, lengths, strict=True)]
    contexts = [context - skip for context, skip in zip(contexts, skipped, strict=True)]
    for sequences in _groups(lengths, contexts, bias_heads):
        start, queries, skip, context = (
            torch.tensor([values[s] for s in sequences], device=rows.device)
            for values in (starts, lengths, skipped, contexts)
        )
        query = torch.arange(max(lengths[s] for s in sequences), device=rows.device)
        longest = max(contexts[s] for s in sequences)
        slots = _slots(req_to_token, rows[sequences], skip, context, longest)
        live = query < queries[:, None]
        tokens = torch.where(live, start[:, None] + query, 0)
        is_whole = lengths[sequences[0]] == contexts[sequences[0]]
        is_plain = is_whole and bias_heads == 0 and not 0 < window < len(query) and longest >= _FEWEST_UNMASKED_KEYS
        # The position of each query bounds what it sees; padded keys lie behind it.
        position = (context - queries)[:, None] + query
        yield _Prompts(tokens, live, slots, position, _seen(position, longest, window), is_plain)


def _groups(lengths: list[int], contexts: list[int], bias_heads: int) -> Iterator[list[int]]:
    """Sequences to compute together: they are alike in length, and in whether any of the context is cached.

    Lengths of one power of two are padded to the longest of them, so at most half of a side is padding.
    """
    groups: dict[tuple[int, int, bool], list[int]] = defaultdict(list)
    for sequence, (queries, context) in enumerate(zip(lengths, contexts, strict=True)):
        if queries > 0:
            groups[queries.bit_length(), context.bit_length(), queries == context].append(sequence)
    for (query_bits, context_bits, _), group in groups.items():
        at_once = max(1, _BIAS_ELEMENTS // (bias_heads << (query_bits + context_bits))) if bias_heads else len(group)
        yield from (group[first : first + at_once] for first in range(0, len(group), at_once))


def _distance(position: Tensor, longest: int) -> Tensor:
    """From queries at `position` [sequences, queries] to each key, [sequences, 1, queries, keys]."""
    return position[:, None, :, None] - torch.arange(longest, device=position.device)


def _seen(position: Tensor, longest: int, window: int) -> Tensor:
    """Whether queries see each key, [sequences, 1, queries, keys]."""
    distance = _distance(position, longest)
    return distance >= 0 if window == 0 else (distance >= 0) & (distance < window)


def _bias(position: Tensor, seen: Tensor, alibi_slopes: Tensor) -> Tensor:
    """What is added to scores, [sequences, heads, queries, keys]."""
    return torch.where(seen, alibi_slopes[:, None, None] * -_distance(position, seen.shape[-1]), -torch.inf)


def token_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    req_to_token: Tensor,
    rows: Tensor,
    context_lengths: Tensor,
    max_context_length: int,  # noqa: ARG001 - what the launcher sizes its grid by
    scale: float,
    alibi_slopes: Tensor | None = None,
    window: int = 0,
    scales: Tensor | None = None,
    out: Tensor | None = None,
    memo: StepMemo | None = None,
    norm: HeadNorm | None = None,
    soft_cap: float = 0.0,
) -> Tensor:
    def of_decodes() -> tuple[_Turns, _Places]:
        return _Turns.of(cos, sin), _Places.of(slots.masked_fill(context_lengths == 0, -1))

    out = torch.zeros_like(q) if out is None else out
    turns, places = once(memo, "decodes' new tokens", of_decodes)
    q, k = _normed(q, k, norm)
    q = _rotate(q, turns).to(q.dtype)
    _write(_rotate(k, turns), v, places, k_pool, v_pool, scales)
    kv_heads, head_dim = k_pool.shape[1:]
    tables = req_to_token, rows, context_lengths
    for decodes in once(memo, ("decodes", window), lambda: list(_decodes(*tables, window, q.dtype))):
        mask = decodes.mask
        if alibi_slopes is not None:
            # The query heads that share a KV head take the place of query positions.
            bias = _bias(decodes.position, decodes.seen[:, None, None], alibi_slopes)
            mask = bias.reshape(len(bias), kv_heads, -1, bias.shape[-1])
        chosen = q if decodes.sequences is None else q[decodes.sequences]
        result = _attention(
            chosen.reshape(len(chosen), kv_heads, -1, head_dim),
            _gather(k_pool, scales, 0, decodes.slots, q.dtype).transpose(1, 2),
            _gather(v_pool, scales, 1, decodes.slots, q.dtype).transpose(1, 2),
            mask,
            False,
            scale,
            soft_cap,
        ).reshape(chosen.shape)
        if decodes.sequences is None:
            out.copy_(result)
        else:
            out[decodes.sequences] = result
    return out


class _Decodes(NamedTuple):
    """Sequences that see much the same number of tokens and are computed together, padded to the longest."""

    sequences: list[int] | None  # None: all
    slots: Tensor  # [sequences, keys] int64
    position: Tensor  # [sequences, 1], of the query among the keys
    seen: Tensor  # [sequences, keys] bool
    mask: Tensor | None  # [sequences, 1, 1, keys], -inf at padding; None: not needed


def _decodes(
    req_to_token: Tensor, rows: Tensor, context_lengths: Tensor, window: int, dtype: torch.dtype
) -> Iterator[_Decodes]:
    all_seen = context_lengths.clamp_max(window) if window else context_lengths
    contexts = all_seen.tolist()
    groups: dict[int, list[int]] = defaultdict(list)
    for sequence, context in enumerate(contexts):
        groups[context.bit_length()].append(sequence)
    groups.pop(0, None)
    for sequences in groups.values():
        lengths = [contexts[s] for s in sequences]
        seen, longest = all_seen[sequences], max(lengths)
        slots = _slots(req_to_token, rows[sequences], context_lengths[sequences] - seen, seen, longest)
        position = seen[:, None] - 1
        is_seen = torch.arange(longest, device=rows.device) <= position
        mask = None
        if min(lengths) < longest or longest < _FEWEST_UNMASKED_KEYS:
            mask = torch.zeros(is_seen.shape, dtype=dtype, device=rows.device).masked_fill(~is_seen, -torch.inf)
            mask = mask[:, None, None]
        yield _Decodes(sequences if len(sequences) < len(contexts) else None, slots, position, is_seen, mask)


def token_attention_int8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    scales: Tensor,
    req_to_token: Tensor,
    rows: Tensor,
    context_lengths: Tensor,
    max_context_length: int,
    scale: float,
    alibi_slopes: Tensor | None = None,
    window: int = 0,
    out: Tensor | None = None,
    memo: StepMemo | None = None,
    norm: HeadNorm | None = None,
    soft_cap: float = 0.0,
) -> Tensor:
    table = (req_to_token, rows, context_lengths, max_context_length)
    new = (q, k, v, cos, sin, slots)
    return token_attention(*new, k_pool, v_pool, *table, scale, alibi_slopes, window, scales, out, memo, norm, soft_cap)


def _slots(req_to_token: Tensor, rows: Tensor, skipped: Tensor, contexts: Tensor, longest: int) -> Tensor:
    """The slots of some sequences' contexts behind what is skipped, [sequences, longest].

    Padding repeats a context's first token, so that a slot that nobody has written (it may hold NaN) is never read.
    """
    position = torch.arange(longest, device=rows.device)
    position = skipped[:, None] + torch.where(position < contexts[:, None], position, 0)
    return req_to_token[rows.long()[:, None], position].long()


def _gather(pool: Tensor, scales: Tensor | None, index: int, slots: Tensor, dtype: torch.dtype) -> Tensor:
    """K (0) or V (1) at `slots` [sequences, longest] as [sequences, longest, kv_heads, head_dim]."""
    # Several times as quick as pool[slots] on a CPU.
    values = pool.index_select(0, slots.view(-1)).view(*slots.shape, *pool.shape[1:])
    return values if scales is None else (values.float() * scales[slots, :, index].float().unsqueeze(-1)).to(dtype)


def merge_splits(
    partial: Tensor, log_sums: Tensor, context_lengths: Tensor, window: int, block_tokens: int, out: Tensor
) -> Tensor:
    splits = partial.shape[2]
    seen = context_lengths.clamp_max(window) if window else context_lengths
    blocks = (seen + block_tokens - 1) // block_tokens
    length = (blocks + splits - 1) // splits * block_tokens
    used = (seen + length - 1) // length.clamp_min(1)
    live = (torch.arange(splits, device=out.device) < used[:, None])[:, None]
    log_sums = torch.where(live, log_sums, -torch.inf)
    weights = torch.exp2(log_sums - log_sums.amax(-1, keepdim=True))
    values = torch.where(live.unsqueeze(-1), partial, 0.0)
    joined = (weights.unsqueeze(-1) * values).sum(2) / weights.sum(-1, keepdim=True)
    return out.copy_(torch.where(used[:, None, None] > 0, joined, out))
