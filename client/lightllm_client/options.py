# SPDX-License-Identifier: Apache-2.0
"""The options of a request. `python -m lightllm_backend.client_options` writes this file from the server's table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict


class Options(TypedDict, total=False):
    """The options of a request. An option that is left out is not sent, and the server's default holds."""

    max_tokens: int
    do_sample: bool
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: Mapping[int, float]
    seed: int
    min_tokens: int
    ignore_eos: bool
    stop_words: str | Sequence[str]
    stop_token_ids: int | Sequence[int]
    exclude_input_in_output: bool
    parse_special: bool
    skip_special_tokens: bool
    structured_output: Mapping[str, Any]
    allowed_token_ids: int | Sequence[int]
    return_log_probs: bool
    top_logprobs: int
    prompt_logprobs: int
    n: int
    tenant: str
    priority: int


# The type of each option's input tensor.
DATATYPES: dict[str, str] = {
    "max_tokens": "INT32",
    "do_sample": "BOOL",
    "temperature": "FP32",
    "top_p": "FP32",
    "top_k": "INT32",
    "min_p": "FP32",
    "presence_penalty": "FP32",
    "frequency_penalty": "FP32",
    "repetition_penalty": "FP32",
    "logit_bias": "BYTES",
    "seed": "UINT64",
    "min_tokens": "INT32",
    "ignore_eos": "BOOL",
    "stop_words": "BYTES",
    "stop_token_ids": "INT32",
    "exclude_input_in_output": "BOOL",
    "parse_special": "BOOL",
    "skip_special_tokens": "BOOL",
    "structured_output": "BYTES",
    "allowed_token_ids": "INT32",
    "return_log_probs": "BOOL",
    "top_logprobs": "INT32",
    "prompt_logprobs": "INT32",
    "n": "INT32",
    "tenant": "BYTES",
    "priority": "INT32",
}

# These take any number of values; one value needs no list around it.
LISTS = ("stop_words", "stop_token_ids", "allowed_token_ids")

# These are sent as JSON.
JSON = ("logit_bias", "structured_output")

# What other servers and libraries call these options.
OTHER_NAMES: dict[str, str] = {
    "max_new_tokens": "max_tokens",
    "random_seed": "seed",
    "min_length": "min_tokens",
    "min_new_tokens": "min_tokens",
    "stop": "stop_words",
    "stop_sequences": "stop_words",
    "stop_ids": "stop_token_ids",
    "return_logprobs": "return_log_probs",
    "num_return_sequences": "n",
    "request_priority": "priority",
}

# What each option does, as the command line says it.
HELP: dict[str, str] = {
    "max_tokens": "Tokens to generate at most; with the prompt at most max_req_total_len (default: 16).",
    "do_sample": "Draw tokens instead of the likeliest (default: true if temperature > 0, top_p or top_k is given).",
    "temperature": "Flattens (> 1) or sharpens (< 1) the distribution; 0 takes the likeliest token (default: 1.0).",
    "top_p": "Draw from the likeliest tokens that together have this probability (default: 1.0).",
    "top_k": "Draw from this many of the likeliest tokens (default: -1).",
    "min_p": "Draw from tokens at least min_p times as likely as the likeliest, before top_k and top_p (default: 0.0).",
    "presence_penalty": "Subtracted from the logit of each token generated before (default: 0.0).",
    "frequency_penalty": "Subtracted from the logit of a token once for each time it was generated (default: 0.0).",
    "repetition_penalty": "Divides the likelihood of tokens of the prompt and the answer (default: 1.0).",
    "logit_bias": "Added to the logits of these token ids, before penalties; as JSON in the tensor and in parameters.",
    "seed": "The same seed gives the same draw (default: drawn). The tensor cannot hold -1.",
    "min_tokens": "Ignore EOS, stop ids and stop words until this many tokens; at most max_tokens (default: 0).",
    "ignore_eos": "Go on after the model's end of sequence (default: no).",
    "stop_words": "End before any of these texts. May be given several times.",
    "stop_token_ids": "End with any of these ids, even with ignore_eos. May be given several times.",
    "exclude_input_in_output": "Leave the prompt out of the answer (default: yes).",
    "parse_special": "Take special tokens in the prompt as tokens, not as text (default: yes).",
    "skip_special_tokens": "Leave special tokens out of the answer (default: yes).",
    "structured_output": "What the answer must follow: JSON with json_schema, json_object, regex, choice or grammar.",
    "allowed_token_ids": "Draw from these tokens only; not beside structured_output. May be given several times.",
    "return_log_probs": "Ask for the log probability of each new token (default: no).",
    "top_logprobs": "So many of the likeliest tokens beside each new one; asks for log probabilities too (default: 0).",
    "prompt_logprobs": "Log probabilities of the prompt and of this many likeliest tokens; -1: none (default: -1).",
    "n": "Answers to make to the prompt, which is computed once; answer i draws with seed + i (default: 1).",
    "tenant": "Whose share of the server the request takes; requests that name no tenant share one.",
    "priority": "The lowest of a tenant's waiting requests goes first; a level is worth 10 s of waiting (default: 0).",
}
