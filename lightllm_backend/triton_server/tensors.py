# SPDX-License-Identifier: Apache-2.0
"""The tensors of every model in model_repository: names, types, sizes. model_configs writes config.pbtxt from here.

A tensor is name: (type, size); a size of -1 is any size.
"""

from __future__ import annotations

from lightllm_backend.option_table import OPTION_TENSORS

Tensors = dict[str, tuple[str, int]]

SAMPLING_PARAMETERS = "sampling_parameters"
PUBLIC_INPUTS: Tensors = {**OPTION_TENSORS, SAMPLING_PARAMETERS: ("STRING", 1)}
PUBLIC_OUTPUTS: Tensors = {
    "text_output": ("STRING", 1),
    "finish_reason": ("STRING", 1),
    "num_input_tokens": ("INT32", 1),
    "num_output_tokens": ("INT32", 1),
    "output_ids": ("INT32", -1),
    "output_log_probs": ("FP32", -1),
    "cumulative_logprob": ("FP32", 1),
    "logprobs": ("STRING", 1),
}
# tokenizer ──> generation. ENSEMBLE is an EnsembleContext; its presence says that a detokenizer follows.
ENSEMBLE = "ensemble"
GENERATION_INPUTS: Tensors = {"input_ids": ("INT32", -1), SAMPLING_PARAMETERS: ("STRING", 1), ENSEMBLE: ("STRING", 1)}
# generation ──> detokenizer. CHUNK is a ChunkDetails: everything about a chunk but its tokens.
CHUNK = "chunk"
GENERATION_OUTPUTS: Tensors = {"output_ids": ("INT32", -1), "output_log_probs": ("FP32", -1), CHUNK: ("STRING", 1)}
HEALTH_OUTPUTS: Tensors = {"report": ("STRING", 1)}

MODEL_TENSORS: dict[str, tuple[Tensors, Tensors]] = {
    "lightllm": (PUBLIC_INPUTS, PUBLIC_OUTPUTS),
    "lightllm_unary": (PUBLIC_INPUTS, PUBLIC_OUTPUTS),
    "tokenizer": (PUBLIC_INPUTS, GENERATION_INPUTS),
    "generation": (GENERATION_INPUTS, GENERATION_OUTPUTS),
    "detokenizer": (GENERATION_OUTPUTS, PUBLIC_OUTPUTS),
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
REQUIRED_INPUTS = {"generation": {"input_ids"}, "detokenizer": set(GENERATION_OUTPUTS)}
