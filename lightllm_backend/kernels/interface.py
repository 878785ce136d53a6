# SPDX-License-Identifier: Apache-2.0
"""The kernels' interface: signature, shapes, dtypes, and what is written in place.

Shapes are in brackets. New tokens are packed [tokens, ...], without padding. K and V of a layer live in a pool:
`k_pool` and `v_pool` [slots, kv_heads, head_dim] of the model's dtype, or int8 with `scales` [slots, kv_heads, 2]
float16, the factors of K and of V. `req_to_token` [table rows, max length] int32 holds the slot of each position of a
sequence; `rows` [sequences] int32 names the sequences' rows of it; `context_lengths` [sequences] int32 counts cached
and new tokens. A `memo` holds what the references derive from these and from the rotation, once for all layers of a
step; launchers do without. Unless said otherwise, floating-point arguments share one dtype, and the last dimension is
contiguous.
"""

from typing import Protocol

import torch
from torch import Tensor

from lightllm_backend.kernels.attention.head_norm import HeadNorm
from lightllm_backend.kernels.attention.step_memo import StepMemo
from lightllm_backend.kernels.attention.whole_prompt_tiles import WholePromptTiles
from lightllm_backend.kernels.collective.lamport_buffers import LamportBuffers
from lightllm_backend.kernels.quantized.rounded_tokens import Activations
from lightllm_backend.kernels.quantized.weight import QuantizedWeight, Weight


class Kernels(Protocol):
    """What models and the runner compute with; `kernels.select` returns the implementation for a device."""

    # Norms. `x` may also be the parts [splits, tokens, dim] of a product (see linear_splits), which are summed first.
    # On a GPU the residual is read before the previous kernel has ended: that kernel must not write it (see
    # dependent_launch.py).

    def rms_norm(
        self,
        x: Tensor,
        weight: Tensor,
        eps: float,
        residual: Tensor | None = None,
        post_weight: Tensor | None = None,
        reader: Weight | None = None,
    ) -> Activations:
        """Root-mean-square norm of `x` [tokens, dim], rounded to the dtype of `weight` [dim], times `weight`.

        With `residual` [tokens, dim], `x` is added to it in place and the sum is normed. With `post_weight` [dim] as
        well, of the same dtype as `weight`, what is added is the norm of `x` times it: the norm that some layers have
        behind attention and MLP. The result has the dtype of what is normed. If only the product with `reader` reads
        it, it may be what quantize_tokens makes of it, RoundedTokens, or PairedTokens, which are about as precise as
        bfloat16.
        """

    def layer_norm(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        residual: Tensor | None = None,
        reader: Weight | None = None,
    ) -> Activations:
        """Layer norm of `x` [tokens, dim] with `weight` and `bias` [dim], in the weight's dtype.

        With `residual` [tokens, dim], `x` is added to it in place and the sum is normed. If only the product with
        `reader` reads the result, it may be what quantize_tokens makes of it, RoundedTokens.
        """

    def all_reduce_rms_norm(
        self,
        x: Tensor,
        weight: Tensor,
        eps: float,
        residual: Tensor,
        buffers: LamportBuffers,
        post_weight: Tensor | None = None,
        reader: Weight | None = None,
    ) -> Activations:
        """rms_norm, with a residual, of the sum of all ranks' `x`; each is rounded to the residual's dtype first.

        All ranks of the group must call it with the same shapes, and get the same bits. The message must fit `buffers`.
        With `reader`, as rms_norm's result.
        """

    def all_reduce_embeddings(
        self, input_ids: Tensor, weight: Tensor, first_id: int, held: int, buffers: LamportBuffers
    ) -> Tensor:
        """The embeddings [tokens, dim] of `input_ids` [tokens] int32.

        The first rows of this rank's `weight` [rows, dim] are those of the `held` ids from `first_id` on. All ranks
        must call it with the same ids, each of which one rank holds. The message must fit `buffers`.
        """

    def all_gather(self, x: Tensor, buffers: LamportBuffers) -> Tensor:
        """All ranks' `x` [tokens, columns] side by side, in order of rank: [tokens, ranks * columns].

        All ranks must call it with the same shape, and get the same bits. The message must fit `buffers` in pieces.
        """

    # Products with a weight [out_features, in_features], a tensor or one of 4 or 8 bits. `x` may also be the
    # RoundedTokens that a norm or gated_linear made for the weight, or the PairedTokens that a norm made.

    def linear(
        self,
        x: Activations,
        weight: Weight,
        bias: Tensor | None = None,
        out: Tensor | None = None,
        is_gelu: bool = False,
    ) -> Tensor:
        """`x` [tokens, in_features] times the transposed `weight`, plus `bias` [out_features].

        With `out` [tokens, out_features], contiguous, the result is written there. With `is_gelu`, and no `out`, it is
        gelu_tanh of the product.
        """

    def linear_splits(self, x: Activations, weight: Weight, bias: Tensor | None = None) -> Tensor:
        """The product of `linear` as parts [splits, tokens, out_features] that add up to it.

        The parts are float32; a single part, or those of a quantised weight, may have the dtype of `x`. A norm adds
        them.
        """

    def sum_splits(self, parts: Tensor, out: Tensor) -> Tensor:
        """Writes the sum of `parts` [splits, tokens, features] in float32 to `out` [tokens, features], and returns it.

        Both are contiguous; `out` has any floating-point dtype.
        """

    def gated_linear(
        self,
        x: Activations,
        weight: Weight,
        bias: Tensor | None = None,
        is_gelu: bool = False,
        reader: Weight | None = None,
    ) -> Activations:
        """silu_and_mul of `linear`, [tokens, features]: `weight` [2 * features, in_features] is the gate's, then the
        up projection's; `bias` is [2 * features]. With `reader`, as rms_norm's result."""

    # Weights of 4 and 8 bits. The products above call these, loading calls arrange_weight.

    def arrange_weight(self, weight: QuantizedWeight) -> QuantizedWeight:
        """The weight in the order in which the products read it best, in place of the given one, whose values change.

        To be called once its tensors are filled.
        """

    def dequantize(self, weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
        """The weight [out_features, in_features] in `dtype`, its columns as `order` counts them, fragments undone."""

    def quantize_tokens(self, x: Tensor, weight: QuantizedWeight) -> tuple[Tensor, Tensor]:
        """`x` [tokens, in_features], whose columns are in the weight's order, in the dtype of an 8-bit weight's values,
        and its scales [tokens, groups] float32, in the weight's groups.

        A scale is the weight's `input_scale`, or else makes the largest magnitude of a token's group that of the dtype.
        """

    def quantized_splits(self, x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
        """`linear_splits` with the activations as they are, whatever the weight says of them."""

    def scaled_linear(
        self, x: Tensor, x_scales: Tensor, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """The product [tokens, out_features], in `dtype`, of what quantize_tokens returns with its 8-bit weight.

        Groups are of 128 columns, or there is one. The weight has no zero points.
        """

    # Activations.

    def silu_and_mul(self, gate_up: Tensor, is_gelu: bool = False) -> Tensor:
        """SiLU of the first half of `gate_up` [tokens, 2 * features] times the second half, [tokens, features].

        With `is_gelu`, gelu_tanh takes the place of SiLU.
        """

    def gelu_tanh(self, x: Tensor) -> Tensor:
        """GELU of `x` [tokens, features], approximated by tanh as in BLOOM."""

    # Attention.

    def rotary_kv_write(
        self,
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
        """Norms and rotates `q` and `k` in place, and writes `k` and `v` to their slots of the pool.

        `q` is [tokens, heads, head_dim], `k` and `v` are [tokens, kv_heads, head_dim], `cos` and `sin` are [tokens,
        rotary_dim / 2] float32. Dimension i is paired with i + rotary_dim / 2; dimensions from rotary_dim on pass
        through. `slots` [tokens] int32 is -1 for padding, which writes nothing to the pool. With `norm`, each head of
        `q` and `k` becomes what rms_norm makes of it before it is rotated.

        With `scales`, K and V are written as int8: each head of a token is divided by the scale that makes its largest
        magnitude 127. `k` and `v` then become, in place, the values that the pool represents; prefill_attention reads
        them there. With `query_starts`, the tokens before query_starts[0], which decode, are left alone.
        """

    def prefill_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
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
        whole_prompts: WholePromptTiles | None = None,
        out: Tensor | None = None,
        memo: StepMemo | None = None,
        soft_cap: float = 0.0,
    ) -> Tensor:
        """Causal attention of new tokens `q` [tokens, heads, head_dim] over their sequences' cached and new tokens.

        Sequence s has the queries `query_starts[s]:query_starts[s + 1]` (int32), which stand at the end of its context.
        `k` and `v` [tokens, kv_heads, head_dim] are the new tokens, as rotary_kv_write leaves them; the pool is read
        for cached tokens only. `alibi_slopes` [heads] float32 lowers a score by slope times distance. With a `window`,
        a query sees itself and the `window - 1` tokens before it; 0: all. With a `soft_cap`, a scaled score s becomes
        soft_cap * tanh(s / soft_cap); 0: none. `whole_prompts` lists the prompts without cached tokens, if the host
        knows them.

        The result goes to `out` [tokens, heads, head_dim], or to a new tensor; rows of no sequence are not written.
        """

    def token_attention(
        self,
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
        max_context_length: int,
        scale: float,
        alibi_slopes: Tensor | None = None,
        window: int = 0,
        scales: Tensor | None = None,
        out: Tensor | None = None,
        memo: StepMemo | None = None,
        norm: HeadNorm | None = None,
        soft_cap: float = 0.0,
    ) -> Tensor:
        """Decode attention: one new token per sequence, `q` [sequences, heads, head_dim], over its context or window.

        The new token is the last of its context. Its query and key are normed and rotated, and K and V written to the
        pool, as by rotary_kv_write; `q`, `k` and `v` stay as they are. No context is longer than `max_context_length`,
        by which the launcher sizes its grid. `alibi_slopes`, `window` and `soft_cap` are as for prefill_attention.

        The result goes to `out` [sequences, heads, head_dim], contiguous, or to a new tensor. A context length of 0
        marks padding: it reads and writes nothing, so its row of `out` stays as it is (0 in a new tensor).
        """

    def token_attention_int8(
        self,
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
        """token_attention over an int8 pool; token_attention calls it for one."""

    def merge_splits(
        self, partial: Tensor, log_sums: Tensor, context_lengths: Tensor, window: int, block_tokens: int, out: Tensor
    ) -> Tensor:
        """Merges attention over parts of each context into `out` [sequences, heads, head_dim], and returns it.

        `partial` [sequences, heads, splits, head_dim] float32 is the attention over each part; `log_sums` [sequences,
        heads, splits] float32 is the logarithm to base 2 of its softmax denominator. All three are contiguous. Each
        part but the last spans the same number of whole blocks of `block_tokens` tokens within the window; empty parts
        behind it are not read. Where the context length is 0, `out` is not written.
        """

    # Sampling.

    def count_tokens(
        self, tokens: Tensor, rows: Tensor, prompt_lengths: Tensor, lengths: Tensor, vocab_size: int
    ) -> Tensor:
        """How often each sequence has generated each token: [sequences, vocab_size] int32.

        Sequence i is `tokens[rows[i], :lengths[i]]` (int32) and begins with a prompt of `prompt_lengths[i]` tokens.
        A token that occurs in the prompt has the bit IN_PROMPT.
        """

    def add_logit_bias(self, logits: Tensor, rows: Tensor, counts: Tensor, token_ids: Tensor, biases: Tensor) -> None:
        """Adds biases to `logits` [sequences, vocab] float32, in place.

        Sequence i has the first `counts[i]` entries of row `rows[i]` of the tables `token_ids` [table rows, width]
        int32, all different, and `biases` [table rows, width] float32. `rows` and `counts` are [sequences] int32.
        """

    def apply_penalties(
        self,
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
        """Penalizes tokens in `logits` [sequences, vocab] float32, in place; sequences are as for count_tokens.

        `repetition` [sequences] float32 applies to tokens of the prompt and generated ones, `frequency` and `presence`
        to generated ones only. While fewer than `min_tokens` [sequences] int32 are generated, `ending_ids`
        [sequences, k] int32, padded with -1, become -inf.
        """

    def apply_token_masks(self, logits: Tensor, masks: Tensor, mask_rows: Tensor, out: Tensor) -> None:
        """Copies `logits` [sequences, vocab] to `out`, float32, with -inf for what a mask does not allow.

        `out` may be `logits`.

        `masks` [masks, ceil(vocab / 32)] int32, contiguous, have one bit a token, the least significant first: 1 allows
        it. `mask_rows` [sequences] int32 names each sequence's mask, -1 for none.
        """

    def choose_greedily(
        self,
        logits: Tensor,
        places: Tensor,
        table: Tensor,
        masks: Tensor | None = None,
        mask_rows: Tensor | None = None,
    ) -> Tensor:
        """The first greatest logit of each row of `logits` [sequences, vocab]: [sequences] int32.

        Also written to `table`, a flat int32 tensor, at `places` [sequences] int64. With `masks` and `mask_rows`, as
        apply_token_masks takes them, the greatest of those that the masks allow. The result is -1 if one of these is
        NaN or the greatest is infinite; the table gets 0 then, since the next step embeds what the table holds.
        """

    def sample(
        self,
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
        """Draws a token from each row of `logits` [sequences, vocab] float32: [sequences] int32.

        `temperature`, `top_p` and `min_p` are [sequences] float32, `top_k` and `position` int32, `seed` int64.
        Temperature 0 takes the first greatest logit. Otherwise one uniform number, a function of seed and position
        alone, picks from the distribution in vocabulary order. Min-p (0: off) keeps the tokens that are at least
        min_p times as likely as the likeliest, then top-k (0: off) the k greatest logits, then top-p the fewest whose
        share of the rest is p; equals of the last one kept are kept. The order is vLLM's.

        Writes to `table` at `places`, and returns -1 for logits that are not numbers, as choose_greedily does.
        """
