# SPDX-License-Identifier: Apache-2.0
"""Plain PyTorch of the attention kernels; kernels/interface.py says what each function computes."""

from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from lightllm_backend.kernels.attention.kv_scales import MAX_KV_SCALE, MIN_KV_SCALE
from lightllm_backend.kernels.attention.whole_prompt_tiles import WholePromptTiles

# The elements of an attention bias that are built at a time.
_BIAS_ELEMENTS = 1 << 24


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
) -> None:
    if query_starts is not None:
        q, k, v, cos, sin, slots = (tensor[int(query_starts[0]) :] for tensor in (q, k, v, cos, sin, slots))
    q.copy_(_rotate(q, cos, sin))
    written = _write(_rotate(k, cos, sin), v, slots, k_pool, v_pool, scales)
    for tensor, values in zip((k, v), written, strict=True):
        if tensor is not values:
            tensor.copy_(values)


def _write(
    k: Tensor, v: Tensor, slots: Tensor, k_pool: Tensor, v_pool: Tensor, scales: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Writes K, rotated, and V at their slots, and returns what was written."""
    has_padding = slots.numel() > 0 and int(slots.min()) < 0
    live = slots >= 0 if has_padding else slice(None)
    slots = slots[live].long()
    if scales is None:
        for values, pool in ((k, k_pool), (v, v_pool)):
            pool.index_copy_(0, slots, values[live].to(pool.dtype))
        return k, v
    written = []
    for index, (values, pool) in enumerate(((k, k_pool), (v, v_pool))):
        quantized, scale = _quantize(values.float(), scales.dtype)
        pool[slots], scales[slots, :, index] = quantized[live], scale[live]
        written.append(quantized * scale.float().unsqueeze(-1))
    return written[0], written[1]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """In float32."""
    half = cos.shape[-1]
    first, second = x[..., :half].float(), x[..., half : 2 * half].float()
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    return torch.cat((rotated, x[..., 2 * half :].float()), -1) if 2 * half < x.shape[-1] else rotated


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
) -> Tensor:
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    starts, contexts = query_starts.tolist(), context_lengths.tolist()
    lengths = [end - start for start, end in pairwise(starts)]
    # What no query of a sequence sees is left out, as if the sequence began behind it.
    skipped = [max(0, c - n - window + 1) if window else 0 for c, n in zip(contexts, lengths, strict=True)]
    contexts = [context - skip for context, skip in zip(contexts, skipped, strict=True)]
    for sequences in _groups(lengths, contexts, 0 if alibi_slopes is None else q.shape[1]):
        start, queries, skip, context = (
            torch.tensor([values[s] for s in sequences], device=q.device)
            for values in (starts, lengths, skipped, contexts)
        )
        query = torch.arange(max(lengths[s] for s in sequences), device=q.device)
        longest = max(contexts[s] for s in sequences)
        slots = _slots(req_to_token, rows[sequences], skip, context, longest)
        live = query < queries[:, None]
        tokens = torch.where(live, start[:, None] + query, 0)
        is_whole = lengths[sequences[0]] == contexts[sequences[0]]
        is_plain = is_whole and alibi_slopes is None and not 0 < window < len(query)
        # The position of each query bounds what it sees; padded keys lie behind it.
        mask = None if is_plain else _mask((context - queries)[:, None] + query, longest, window, alibi_slopes)
        result = functional.scaled_dot_product_attention(
            q[tokens].transpose(1, 2),
            _gather(k_pool, scales, 0, slots, q.dtype).transpose(1, 2),
            _gather(v_pool, scales, 1, slots, q.dtype).transpose(1, 2),
            attn_mask=mask,
            is_causal=is_plain,
            scale=scale,
            enable_gqa=q.shape[1] != k_pool.shape[1],
        )
        out[tokens[live]] = result.transpose(1, 2)[live]
    return out


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


def _mask(position: Tensor, longest: int, window: int, alibi_slopes: Tensor | None) -> Tensor:
    """What queries at `position` [sequences, queries] see, or their bias, [sequences, 1 or heads, queries, keys]."""
    distance = position[:, None, :, None] - torch.arange(longest, device=position.device)
    seen = distance >= 0 if window == 0 else (distance >= 0) & (distance < window)
    return seen if alibi_slopes is None else torch.where(seen, alibi_slopes[:, None, None] * -distance, -torch.inf)


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
) -> Tensor:
    out = torch.zeros_like(q) if out is None else out
    q = _rotate(q, cos, sin).to(q.dtype)
    _write(_rotate(k, cos, sin), v, slots.masked_fill(context_lengths == 0, -1), k_pool, v_pool, scales)
    groups: dict[int, list[int]] = defaultdict(list)
    seen = context_lengths.clamp_max(window) if window else context_lengths
    contexts = seen.tolist()
    for sequence, context in enumerate(contexts):
        groups[context.bit_length()].append(sequence)
    groups.pop(0, None)
    pools, options = (k_pool, v_pool, scales), (req_to_token, scale, alibi_slopes)
    if len(groups) == 1 and min(contexts) > 0:
        return out.copy_(_attend_padded(q, rows, context_lengths, seen, min(contexts), max(contexts), pools, *options))
    for sequences in groups.values():
        lengths = [contexts[s] for s in sequences]
        part = (q[sequences], rows[sequences], context_lengths[sequences], seen[sequences])
        out[sequences] = _attend_padded(*part, min(lengths), max(lengths), pools, *options)
    return out


def _attend_padded(
    q: Tensor,
    rows: Tensor,
    context_lengths: Tensor,
    seen: Tensor,
    shortest: int,
    longest: int,
    pools: tuple[Tensor, Tensor, Tensor | None],
    req_to_token: Tensor,
    scale: float,
    alibi_slopes: Tensor | None,
) -> Tensor:
    """Decode attention of sequences that see much the same number of tokens, padded to the longest.

    pools: of K, of V, and the scales.
    """
    sequences, heads, head_dim = q.shape
    k_pool, v_pool, scales = pools
    kv_heads = k_pool.shape[1]
    slots = _slots(req_to_token, rows, context_lengths - seen, seen, longest)
    mask = None
    if alibi_slopes is not None:
        # The query heads that share a KV head take the place of query positions.
        mask = _mask(seen[:, None] - 1, longest, 0, alibi_slopes).reshape(sequences, kv_heads, -1, longest)
    elif shortest < longest:
        mask = (torch.arange(longest, device=q.device) < seen[:, None])[:, None, None, :]
    k = _gather(k_pool, scales, 0, slots, q.dtype).transpose(1, 2)
    v = _gather(v_pool, scales, 1, slots, q.dtype).transpose(1, 2)
    grouped = q.reshape(sequences, kv_heads, -1, head_dim)
    result = functional.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=scale)
    return result.reshape(sequences, heads, head_dim)


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
) -> Tensor:
    table = (req_to_token, rows, context_lengths, max_context_length)
    new = (q, k, v, cos, sin, slots)
    return token_attention(*new, k_pool, v_pool, *table, scale, alibi_slopes, window, scales, out)


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
