# SPDX-License-Identifier: Apache-2.0
"""The plain PyTorch reference of every kernel: launchers are tested against it, and a CPU engine runs it."""

from lightllm_backend.kernels.activation.reference import gelu_tanh, silu_and_mul
from lightllm_backend.kernels.attention.reference import (
    merge_splits,
    prefill_attention,
    rotary_kv_write,
    token_attention,
    token_attention_int8,
)
from lightllm_backend.kernels.collective.reference import all_gather, all_reduce_embeddings, all_reduce_rms_norm
from lightllm_backend.kernels.linear.reference import gated_linear, linear, linear_splits, sum_splits
from lightllm_backend.kernels.norm.reference import layer_norm, rms_norm
from lightllm_backend.kernels.quantized.reference import (
    arrange_weight,
    dequantize,
    quantize_tokens,
    quantized_splits,
    scaled_linear,
)
from lightllm_backend.kernels.sampling.reference import (
    add_logit_bias,
    apply_penalties,
    apply_token_masks,
    choose_greedily,
    count_tokens,
    sample,
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
