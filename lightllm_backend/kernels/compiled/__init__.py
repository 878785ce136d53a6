# SPDX-License-Identifier: Apache-2.0
"""The kernels of a CPU engine for speed: the references, some of them compiled by numba.

A step of few tokens reads so few weights that what a reference does around its loops, a dozen calls of PyTorch, takes
longer than the loops. A compiled kernel is one call. Threads share its work only if there is much of it. It hands
everything that is not its common case to the reference.
"""

from lightllm_backend.kernels.compiled.attention import token_attention
from lightllm_backend.kernels.compiled.products import gated_linear, linear, linear_splits
from lightllm_backend.kernels.compiled.rows import rms_norm, silu_and_mul
from lightllm_backend.kernels.reference import (
    add_logit_bias,
    all_gather,
    all_reduce_embeddings,
    all_reduce_rms_norm,
    apply_penalties,
    apply_token_masks,
    arrange_weight,
    choose_greedily,
    count_tokens,
    dequantize,
    gelu_tanh,
    layer_norm,
    merge_splits,
    prefill_attention,
    quantize_tokens,
    quantized_splits,
    rotary_kv_write,
    sample,
    scaled_linear,
    sum_splits,
    token_attention_int8,
)

__all__ = [
    "add_logit_bias",
    "all_gather",
    "all_reduce_embeddings",
    "all_reduce_rms_norm",
    "apply_penalties",
    "apply_token_masks",
    "arrange_weight",
    "choose_greedily",
    "count_tokens",
    "dequantize",
    "gated_linear",
    "gelu_tanh",
    "layer_norm",
    "linear",
    "linear_splits",
    "merge_splits",
    "prefill_attention",
    "quantize_tokens",
    "quantized_splits",
    "rms_norm",
    "rotary_kv_write",
    "sample",
    "scaled_linear",
    "silu_and_mul",
    "sum_splits",
    "token_attention",
    "token_attention_int8",
]
