# SPDX-License-Identifier: Apache-2.0
"""The tensors of every model in model_repository: names, types, sizes. model_configs writes config.pbtxt from here.

A tensor is name: (type, size); a size of -1 is any size.
"""

from __future__ import annotations

from lightllm_backend.option_table import OPTION_TENSORS

Tensors = dict[str, tuple[str, int]]

SAMPLING_PARAMETERS = "sampling_parameters"
PUBLIC_INPUTS: Tensors = {**OPTION_TENSORS, SAMPLING_PARAMETERS: ("STRING", 1)}
# The k likeliest tokens for each new token, likeliest first: [num_output_tokens, k], flat.
TOP_LOG_PROBS: Tensors = {"top_token_ids": ("INT32", -1), "top_log_probs": ("FP32", -1)}
# They describe each prompt token but the first. The last two have k values for each, the likeliest first.
PROMPT_OUTPUTS: Tensors = {
    "prompt_log_probs": ("FP32", -1),
    "prompt_top_token_ids": ("INT32", -1),
    "prompt_top_log_probs": ("FP32", -1),
}
# A response has one answer, or all n of a request that does not stream: then outputs of size -1 have n values, and
# those of the answers' tokens follow each other.
PUBLIC_OUTPUTS: Tensors = {
    "text_output": ("STRING", -1),
    "finish_reason": ("STRING", -1),
    "num_input_tokens": ("INT32", 1),
    "num_cached_tokens": ("INT32", 1),
    "num_output_tokens": ("INT32", -1),
    "output_ids": ("INT32", -1),
    "output_log_probs": ("FP32", -1),
    "cumulative_logprob": ("FP32", -1),
    "logprobs": ("STRING", -1),
    **TOP_LOG_PROBS,
    "sequence_index": ("INT32", -1),
    **PROMPT_OUTPUTS,
}
# tokenizer ──> generation. ENSEMBLE is a sealed EnsembleContext; its presence says that a detokenizer follows.
ENSEMBLE = "ensemble"
TOKENIZER_OUTPUTS: Tensors = {"input_ids": ("INT32", -1), ENSEMBLE: ("UINT8", -1)}
# A direct caller of generation gives sampling_parameters instead.
GENERATION_INPUTS: Tensors = {**TOKENIZER_OUTPUTS, SAMPLING_PARAMETERS: ("STRING", 1)}
# generation ──> detokenizer: a sealed ChunkMessage.
SEALED_CHUNK = "sealed_chunk"
DETOKENIZER_INPUTS: Tensors = {SEALED_CHUNK: ("UINT8", -1)}
# A direct caller of generation gets the tokens, and a JSON object with the rest, in place of the sealed chunk.
CHUNK = "chunk"
DIRECT_OUTPUTS: Tensors = {
    "output_ids": ("INT32", -1),
    "output_log_probs": ("FP32", -1),
    **TOP_LOG_PROBS,
    **PROMPT_OUTPUTS,
    CHUNK: ("STRING", 1),
}
HEALTH_OUTPUTS: Tensors = {"report": ("STRING", 1)}

MODEL_TENSORS: dict[str, tuple[Tensors, Tensors]] = {
    "lightllm": (PUBLIC_INPUTS, PUBLIC_OUTPUTS),
    "lightllm_unary": (PUBLIC_INPUTS, PUBLIC_OUTPUTS),
    "tokenizer": (PUBLIC_INPUTS, TOKENIZER_OUTPUTS),
    "generation": (GENERATION_INPUTS, DETOKENIZER_INPUTS | DIRECT_OUTPUTS),
    "detokenizer": (DETOKENIZER_INPUTS, PUBLIC_OUTPUTS),
    "health": ({}, HEALTH_OUTPUTS),
}
# The ensemble for clients of tensorrtllm_backend, who send [1, size] tensors and know one output by another name.
BATCHED_ENSEMBLE = "ensemble"
BATCHED_OUTPUT_NAMES = {"cumulative_logprob": "cum_log_probs"}
MODEL_TENSORS[BATCHED_ENSEMBLE] = (
    PUBLIC_INPUTS,
    {BATCHED_OUTPUT_NAMES.get(name, name): tensor for name, tensor in PUBLIC_OUTPUTS.items()},
)
# Inputs of all other models are optional.
REQUIRED_INPUTS = {"generation": {"input_ids"}, "detokenizer": set(DETOKENIZER_INPUTS)}
