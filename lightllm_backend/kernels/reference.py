# SPDX-License-Identifier: Apache-2.0
"""Plain PyTorch of every kernel: what the launchers are tested against, and what a CPU engine runs.

Tokens are packed `[tokens, heads, head_dim]` without padding. K and V of one layer live in a pool
`[slots, kv_heads, head_dim]`, and `req_to_token[row, position]` names the slot of a sequence's position. Pools of int8
come with scales `[slots, kv_heads, 2]` float16, by which the values of K and of V are multiplied.
"""

from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from lightllm_backend.kernels.kv_scales import MAX_KV_SCALE, MIN_KV_SCALE
from lightllm_backend.kernels.mailboxes import EMPTY, SENT_FOR_EMPTY, Mailboxes
from lightllm_backend.kernels.whole_prompts import WholePrompts

# In a table of token counts, this bit says that the token occurs in the prompt; the bits below count generated ones.
IN_PROMPT = 1 << 30

# How many elements of an attention bias are made at a time.
_BIAS_ELEMENTS = 1 << 24

# How many of the most probable tokens are looked at before a whole row is sorted for top-p.
_TOP_P_CANDIDATES = 1024


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """Root-mean-square norm of `x` [tokens, dim]; with a residual, that of `residual += x`, changed in place.

    `x` may be the parts [splits, tokens, dim] of a product, see linear_splits; their sum is meant. The result is of the
    weight's type. The residual must not come from the kernel launched right before: on a GPU it is read ahead, see
    kernels.dependent_launch.
    """
    x = _sum_of_parts(x)
    if residual is not None:
        residual += x
        x_float = residual.float()
    else:
        x_float = x.float()
    normalized = x_float * torch.rsqrt(x_float.square().mean(-1, keepdim=True) + eps)
    # Rounded before the product with the weight, as the models were trained.
    return weight * normalized.to(weight.dtype)


def _sum_of_parts(x: Tensor) -> Tensor:
    if x.dim() == 2:
        return x
    return x[0] if len(x) == 1 else x.float().sum(0)


def all_reduce_rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor, mailboxes: Mailboxes) -> Tensor:
    """rms_norm of `residual +=` the sum of all ranks' `x`, each rounded to the residual's type before it is sent.

    All ranks call it alike, and get the same bits. `x` may be the parts of this rank's product, as for rms_norm.
    """
    tokens, rank = x.shape[-2], mailboxes.rank
    own, ranks = mailboxes.boxes[rank], len(mailboxes.boxes)
    token, turn = torch.arange(tokens, device=x.device), mailboxes.turns[:tokens].long()
    product = _sum_of_parts(x).to(residual.dtype).contiguous().view(own.dtype)

    def send(receiver: int, rows: Tensor, bits: Tensor) -> None:
        bits = bits.masked_fill(bits == EMPTY, SENT_FOR_EMPTY)
        mailboxes.boxes[receiver][turn[rows], rank, token[rows]] = bits

    def receive(senders: Tensor, rows: Tensor) -> Tensor:
        place = (turn[rows], senders, token[rows])
        while bool(((arrived := own[place]) == EMPTY).any()):
            pass
        own[place] = EMPTY
        return arrived.view(residual.dtype)

    in_two_shots = mailboxes.take_two_shots(tokens)
    # Who adds up a row.
    adders = [token % ranks == other if in_two_shots else token >= 0 for other in range(ranks)]
    for other in range(ranks):
        send(other, adders[other], product[adders[other]])
    mine, theirs = adders[rank], ~adders[rank]
    arrived = [receive(torch.full_like(token[mine], sender), mine) for sender in range(ranks)]
    residual[mine] = (residual[mine].float() + torch.stack(arrived).float().sum(0)).to(residual.dtype)
    if in_two_shots:
        for other in range(ranks):
            if other != rank:
                send(other, mine, residual[mine].view(own.dtype))
        residual[theirs] = receive(token[theirs] % ranks, theirs)
    mailboxes.turns[:tokens] = 1 - turn
    return rms_norm(residual, weight, eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """Layer norm of `x` [tokens, dim]; with a residual, that of `residual += x`, changed in place.

    `x` may be the parts [splits, tokens, dim] of a product, and the residual is read ahead, as for rms_norm.
    """
    x = _sum_of_parts(x)
    if residual is not None:
        residual += x
        x = residual
    x = x.to(weight.dtype)
    return functional.layer_norm(x, (x.shape[1],), weight, bias, eps)


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
    """Rotates `q` [tokens, heads, head_dim] in place, and writes rotated `k` and `v` at their slots of the pool.

    `cos` and `sin` are [tokens, rotary_dim / 2]; dimension i is paired with i + rotary_dim / 2, and dimensions from
    rotary_dim on pass through. A token whose slot is -1 is padding and writes nothing. With scales, K and V are
    written as int8, each head of a token divided by the scale that makes its greatest magnitude 127.

    `k` and `v` become what was written, in place: prefill_attention reads them there. With `query_starts`, tokens
    before query_starts[0] are left alone: they decode.
    """
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
    whole_prompts: WholePrompts | None = None,  # noqa: ARG001 - says nothing new
    out: Tensor | None = None,
) -> Tensor:
    """Causal attention of new tokens [tokens, heads, head_dim] over their sequence's cached and new ones.

    The queries of sequence s are `query_starts[s]:query_starts[s + 1]` and stand at the end of its context. K and V of
    the new tokens are `k` and `v` [tokens, kv_heads, head_dim], as rotary_kv_write has left them there and written them
    to the pool, which has those of the cached tokens. Tokens of no sequence are left as they are in `out`.
    `alibi_slopes` [heads] float32 lowers a score by slope times distance; with a window, a query sees itself and the
    `window - 1` tokens before it. `whole_prompts` are those without cached tokens, if the host knows them. With `out`,
    which has q's shape, the result is written there.
    """
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
    """Attention of one new token of each sequence, `q` [sequences, heads, head_dim], over its whole context or window.

    `q` and `k` are rotated, and `k` and `v` written to the pools, as by rotary_kv_write; the new token is the last of
    the context. With `out`, contiguous and of q's shape, the result is written there. A context length of 0 marks a
    padding row: it reads and writes nothing, and its part of `out` stays as it is (zeros without `out`).
    """
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
    q: Tensor, rows: Tensor, context_lengths: Tensor, seen: Tensor, shortest: int, longest: int,
    pools: tuple[Tensor, Tensor, Tensor | None], req_to_token: Tensor, scale: float, alibi_slopes: Tensor | None,
) -> Tensor:  # fmt: skip
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
    """token_attention over pools of int8."""
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
    """Joins attention over parts of a context, `partial` [sequences, heads, splits, head_dim], into that over it all,
    `out` [sequences, heads, head_dim], contiguous.

    `log_sums` [sequences, heads, splits] are the logarithms to base 2 of each part's softmax denominator. Each part but
    the last has as many tokens, whole blocks of `block_tokens` of what the window shows of the context; what is said of
    the empty ones behind them is not read. Where `context_lengths` [sequences] is 0, `out` stays as it is.
    """
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


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """`x` [tokens, in_features] times `weight` [out_features, in_features] transposed, plus `bias` [out_features].

    With `out` [tokens, out_features], which is contiguous, the result is written there.
    """
    product = functional.linear(x, weight, bias)
    return product if out is None else out.copy_(product)


def linear_splits(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product of `linear` in parts [splits, tokens, out_features] whose sum it is: float32, or one of x's type."""
    return functional.linear(x, weight, bias).unsqueeze(0)


def sum_splits(parts: Tensor, out: Tensor) -> Tensor:
    """The sum of `parts` [splits, tokens, features], float32, over its splits, into `out` [tokens, features]."""
    return out.copy_(parts.sum(0))


def gated_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """silu_and_mul of `linear`: `weight` [2 * features, in_features] is the gate's, then the other's."""
    return silu_and_mul(functional.linear(x, weight, bias))


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """SiLU of the first half of `gate_up` [tokens, 2 * features], times its second half."""
    gate, up = gate_up.chunk(2, -1)
    return (functional.silu(gate.float()) * up.float()).to(gate_up.dtype)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU of `x` [tokens, features] in its approximation by tanh, as in BLOOM."""
    return functional.gelu(x, approximate="tanh")


def count_tokens(tokens: Tensor, rows: Tensor, prompt_lengths: Tensor, lengths: Tensor, vocab_size: int) -> Tensor:
    """How often each sequence has generated each token, [sequences, vocab_size] int32.

    A token of the sequence's prompt has the bit IN_PROMPT.
    """
    count = torch.zeros((rows.shape[0], vocab_size), dtype=torch.int32, device=tokens.device)
    longest = int(lengths.max()) if lengths.numel() else 0
    position = torch.arange(longest, device=tokens.device)
    history = tokens[rows.long(), :longest].long()
    history = torch.where(position < lengths[:, None], history, 0)
    generated = (position >= prompt_lengths[:, None]) & (position < lengths[:, None])
    count.scatter_add_(1, history, generated.to(torch.int32))
    in_prompt = torch.zeros_like(count)
    is_prompt = position < torch.minimum(prompt_lengths, lengths)[:, None]
    in_prompt.scatter_add_(1, history, is_prompt.to(torch.int32))
    return torch.where(in_prompt > 0, count + IN_PROMPT, count)


def apply_penalties(
    logits: Tensor,
    tokens: Tensor,
    rows: Tensor,
    prompt_lengths: Tensor,
    lengths: Tensor,
    presence: Tensor,
    frequency: Tensor,
    repetition: Tensor,
    min_tokens: Tensor,
    ending_ids: Tensor,
) -> None:
    """Penalises in `logits` [sequences, vocab], in place, the tokens of `tokens[rows[i], :lengths[i]]`.

    Repetition covers the prompt and what was generated; frequency and presence only what was generated. While fewer
    than `min_tokens` are generated, a sequence's `ending_ids` [sequences, k], filled up with -1, are ruled out.
    """
    penalised = ((presence != 0) | (frequency != 0) | (repetition != 1)).nonzero().squeeze(1)
    if penalised.numel():
        seen = count_tokens(tokens, rows[penalised], prompt_lengths[penalised], lengths[penalised], logits.shape[1])
        generated = seen & (IN_PROMPT - 1)
        values = logits[penalised]
        factor = repetition[penalised, None]
        values = torch.where(seen > 0, torch.where(values > 0, values / factor, values * factor), values)
        penalty = generated * frequency[penalised, None] + presence[penalised, None]
        logits[penalised] = torch.where(generated > 0, values - penalty, values)
    ruled_out = (lengths - prompt_lengths < min_tokens)[:, None] & (ending_ids >= 0)
    sequences, index = ruled_out.nonzero(as_tuple=True)
    logits[sequences, ending_ids[sequences, index].long()] = -torch.inf


def choose_greedily(logits: Tensor, places: Tensor, table: Tensor) -> Tensor:
    """The first of the greatest logits of each row [sequences, vocab], int32, also written to these places of the
    table, which is flat."""
    tokens = logits.argmax(-1).int()
    table.index_copy_(0, places, tokens)
    return tokens


def sample(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, seed: Tensor, position: Tensor) -> Tensor:
    """Draws a token of each row of `logits` [sequences, vocab]; int32.

    Temperature 0 takes the greatest logit, the first of equals. Otherwise one uniform number, which depends on the
    sequence's seed and position alone, picks from the distribution in the vocabulary's order. Top-k keeps the k
    greatest, then top-p the fewest that hold the share p of what is left; equals of the last one kept are kept.
    """
    tokens = logits.argmax(-1)
    is_drawn = temperature > 0
    if is_drawn.any():
        # A row without a finite maximum has no distribution to draw from.
        drawn = (is_drawn & logits.amax(-1).isfinite()).nonzero().squeeze(1)
        uniform = _uniform(seed[drawn], position[drawn])
        tokens[drawn] = _draw(logits[drawn], temperature[drawn, None], top_k[drawn], top_p[drawn, None], uniform)
    return tokens.to(torch.int32)


def _draw(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, uniform: Tensor) -> Tensor:
    vocab_size = logits.shape[1]
    maximum = logits.amax(-1, keepdim=True)
    weights = torch.exp((logits - maximum) / temperature)
    has_top_k = (top_k > 0) & (top_k < vocab_size)
    if has_top_k.any():
        last = torch.where(has_top_k, top_k, 1).long()
        greatest = logits.topk(int(last.max()), -1).values
        threshold = greatest.gather(1, last[:, None] - 1)
        weights = torch.where(has_top_k[:, None] & (logits < threshold), 0.0, weights)
    if (top_p < 1).any():
        # Tokens that top-k has dropped have no weight and come last.
        kept = torch.where(weights > 0, logits, -torch.inf)
        needed = top_p.double() * weights.sum(-1, keepdim=True, dtype=torch.float64)
        threshold = _top_p_threshold(kept, maximum, temperature, needed)
        weights = torch.where((top_p < 1) & (logits < threshold), 0.0, weights)
    cumulated = weights.cumsum(-1, dtype=torch.float64)
    # The first token whose sum exceeds the target has weight, and in float64 the target stays below the total.
    target = uniform.double()[:, None] * cumulated[:, -1:]
    return torch.searchsorted(cumulated, target, right=True).squeeze(1)


def _top_p_threshold(logits: Tensor, maximum: Tensor, temperature: Tensor, needed: Tensor) -> Tensor:
    """The logit of the last token that is `needed` when the most probable ones are taken first."""
    for candidates in (_TOP_P_CANDIDATES, logits.shape[1]):
        greatest = logits.topk(min(candidates, logits.shape[1]), -1).values
        cumulated = torch.exp((greatest - maximum) / temperature).cumsum(-1, dtype=torch.float64)
        if (cumulated[:, -1:] >= needed).all():
            break
    last = torch.searchsorted(cumulated, needed.contiguous()).clamp_max(greatest.shape[1] - 1)
    return greatest.gather(1, last)


def _uniform(seed: Tensor, position: Tensor) -> Tensor:
    """A number of 24 bits in [0, 1) for each sequence."""
    zero = torch.zeros_like(seed)
    # The seed's int64 holds the bits of an unsigned number; the masks keep both halves non-negative.
    key = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    word = _philox((position.long() & 0xFFFFFFFF, zero, zero, zero), key)[0]
    return (word >> 8).float() * 2.0**-24


def _philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox-4x32-10 (Salmon et al., 2011) on int64 tensors that hold 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(c0, 0xD2511F53)
        high1, low1 = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def _multiply(x: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """High and low word of a 32-bit product, in halves of the constant so that int64 does not overflow."""
    upper = x * (constant >> 16)
    middle = (upper & 0xFFFF) * 0x10000 + x * (constant & 0xFFFF)
    return (upper >> 16) + (middle >> 32), middle & 0xFFFFFFFF
