# SPDX-License-Identifier: Apache-2.0
"""Plain PyTorch of sampling; kernels/interface.py says what each function computes."""

import torch
from torch import Tensor

# In a table of token counts, this bit says that the token occurs in the prompt; the bits below count generated ones.
IN_PROMPT = 1 << 30

# How many of the most probable tokens are looked at before a whole row is sorted for top-p.
_TOP_P_CANDIDATES = 1024


def count_tokens(tokens: Tensor, rows: Tensor, prompt_lengths: Tensor, lengths: Tensor, vocab_size: int) -> Tensor:
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


def add_logit_bias(logits: Tensor, rows: Tensor, counts: Tensor, token_ids: Tensor, biases: Tensor) -> None:
    entry = torch.arange(token_ids.shape[1], device=logits.device)
    sequences, entries = (entry < counts[:, None]).nonzero(as_tuple=True)
    places = rows[sequences].long(), entries
    logits[sequences, token_ids[places].long()] += biases[places]


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


def apply_token_masks(logits: Tensor, masks: Tensor, mask_rows: Tensor, out: Tensor) -> None:
    out.copy_(logits)
    masked = (mask_rows >= 0).nonzero().squeeze(1)
    words = masks[mask_rows[masked].long()]
    bits = (words[:, :, None] >> torch.arange(32, dtype=torch.int32, device=words.device)) & 1
    ruled_out = bits.flatten(1)[:, : logits.shape[1]] == 0
    out[masked] = out[masked].masked_fill(ruled_out, -torch.inf)


def choose_greedily(
    logits: Tensor, places: Tensor, table: Tensor, masks: Tensor | None = None, mask_rows: Tensor | None = None
) -> Tensor:
    if masks is not None and mask_rows is not None:
        allowed = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
        apply_token_masks(logits, masks, mask_rows, allowed)
        logits = allowed
    tokens = _first_greatest(logits).int()
    table.index_copy_(0, places, tokens.clamp_min(0))
    return tokens


def _first_greatest(logits: Tensor) -> Tensor:
    # To `max`, NaN is the greatest.
    maximum, tokens = logits.max(-1)
    return torch.where(maximum.isfinite(), tokens, -1)


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
    places: Tensor,
    table: Tensor,
) -> Tensor:
    tokens = _first_greatest(logits)
    is_drawn = temperature > 0
    if is_drawn.any():
        # Without a finite maximum there is no distribution to draw from.
        drawn = (is_drawn & (tokens >= 0)).nonzero().squeeze(1)
        uniform = _uniform(seed[drawn], position[drawn])
        shares = top_p[drawn, None], min_p[drawn, None]
        tokens[drawn] = _draw(logits[drawn], temperature[drawn, None], top_k[drawn], *shares, uniform)
    tokens = tokens.to(torch.int32)
    table.index_copy_(0, places, tokens.clamp_min(0))
    return tokens


def _draw(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor) -> Tensor:
    vocab_size = logits.shape[1]
    maximum = logits.amax(-1, keepdim=True)
    weights = torch.exp((logits - maximum) / temperature)
    weights = torch.where(logits < maximum + temperature * min_p.log(), 0.0, weights)
    has_top_k = (top_k > 0) & (top_k < vocab_size)
    if has_top_k.any():
        last = torch.where(has_top_k, top_k, 1).long()
        greatest = logits.topk(int(last.max()), -1).values
        threshold = greatest.gather(1, last[:, None] - 1)
        weights = torch.where(has_top_k[:, None] & (logits < threshold), 0.0, weights)
    if (top_p < 1).any():
        # Tokens that min-p and top-k have dropped have no weight and come last.
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
