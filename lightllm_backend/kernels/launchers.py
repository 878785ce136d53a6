# SPDX-License-Identifier: Apache-2.0
"""The launcher of every Triton-lang kernel; interface.py says what each computes."""

from lightllm_backend.kernels.activation.gelu_tanh import gelu_tanh
from lightllm_backend.kernels.activation.silu_and_mul import silu_and_mul
from lightllm_backend.kernels.attention.merge_splits import merge_splits
from lightllm_backend.kernels.attention.prefill_attention import prefill_attention
from lightllm_backend.kernels.attention.rotary_kv_write import rotary_kv_write
from lightllm_backend.kernels.attention.token_attention import token_attention
from lightllm_backend.kernels.attention.token_attention_int8 import token_attention_int8
from lightllm_backend.kernels.collective.all_gather import all_gather
from lightllm_backend.kernels.collective.all_reduce_embeddings import all_reduce_embeddings
from lightllm_backend.kernels.collective.all_reduce_rms_norm import all_reduce_rms_norm
from lightllm_backend.kernels.linear.gated_linear import gated_linear
from lightllm_backend.kernels.linear.linear import linear
from lightllm_backend.kernels.linear.linear_splits import linear_splits
from lightllm_backend.kernels.linear.sum_splits import sum_splits
from lightllm_backend.kernels.norm.layer_norm import layer_norm
from lightllm_backend.kernels.norm.rms_norm import rms_norm
from lightllm_backend.kernels.quantized.arrange_weight import arrange_weight
from lightllm_backend.kernels.quantized.dequantize import dequantize
from lightllm_backend.kernels.quantized.quantize_tokens import quantize_tokens
from lightllm_backend.kernels.quantized.quantized_splits import quantized_splits
from lightllm_backend.kernels.quantized.scaled_linear import scaled_linear
from lightllm_backend.kernels.sampling.add_logit_bias import add_logit_bias
from lightllm_backend.kernels.sampling.apply_penalties import apply_penalties
from lightllm_backend.kernels.sampling.apply_token_masks import apply_token_masks
from lightllm_backend.kernels.sampling.choose_greedily import choose_greedily
from lightllm_backend.kernels.sampling.count_tokens import count_tokens
from lightllm_backend.kernels.sampling.sample import sample

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
