# SPDX-License-Identifier: Apache-2.0
"""The option table: every option of a request, its type and its limits. Standard library only.

The table has the names that clients of LightLLM, vllm_backend, tensorrtllm_backend and NVIDIA's OpenAI frontend use.
The server accepts an unsupported option at its neutral value, and refuses any other value with the reason.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightllm_backend import structured_output
from lightllm_backend.client_json import NotExact, parse_json
from lightllm_backend.request import (
    AS_MANY_AS_FIT,
    MAX_ANSWERS,
    MAX_LOGIT_BIASES,
    MAX_STOP_TOKEN_IDS,
    MAX_TOP_LOG_PROBS,
)

MAX_STOP_WORDS = 32
MAX_STOP_WORD_BYTES = 1024
MAX_LOGIT_BIAS = 100.0  # and the least is its negative, as in OpenAI's API
MAX_TENANT_LENGTH = 64
# As Unicode counts them, with its line and paragraph separators: a tenant's name may stand in logs and metrics.
_CONTROL_CHARACTERS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
MAX_PRIORITY = 10
MAX_INT32 = 2**31 - 1
# More than any model that is served has positions; the engine knows its own limit.
MAX_TOKEN_IDS = 2**20
MAX_SCALAR_CHARACTERS = 1024  # of a number or a boolean that comes as text, with any zeros and spaces
# Above it, several integers round to the same double.
MAX_EXACT_DOUBLE = 2**53


@dataclass(frozen=True)
class Option:
    """One row of the table. `convert` returns the typed value or raises an error; `holds` checks the value."""

    convert: Callable[[Any], Any]
    allowed: str
    holds: Callable[[Any], bool] = lambda value: True
    tensor: tuple[str, int] | None = None  # type and size (-1: any) of the input tensor; None: no tensor
    aliases: tuple[str, ...] = ()  # other names, also for tensors
    keys: tuple[str, ...] = ()  # other names, for JSON keys and request parameters only
    help: str = ""  # what the documentation's table and the client's command line say, beside the default

    @property
    def other_names(self) -> tuple[str, ...]:
        return self.aliases + self.keys


# Converters from a client's value to a typed value


def boolean(value: Any) -> bool:
    if isinstance(value, str):
        value = {"true": True, "1": True, "false": False, "0": False}.get(value.strip().lower())
    if isinstance(value, (bool, int, float)) and value in (0, 1):
        return bool(value)
    raise ValueError


def integer(value: Any) -> int:
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?0*\d{1,20}\s*", value):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        if abs(value) > MAX_EXACT_DOUBLE:
            raise NotExact("which came as a double, and above 2⁵³ one stands for several integers: send a string")
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError
    return value


def number(value: Any) -> float:
    """Convert to a number within the range of 32-bit floating point, the type of the tensors and the sampler."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError
    exact = float(value)
    try:
        [rounded] = struct.unpack("<f", struct.pack("<f", exact))
    except OverflowError:
        raise NotExact("which is too large for 32-bit floating point") from None
    if rounded == 0 != exact:
        raise NotExact("which is 0 in 32-bit floating point")
    return exact


def text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    value.encode()  # raises ValueError for a lone surrogate, which JSON can encode
    return value


def token_ids(value: Any) -> tuple[int, ...]:
    if isinstance(value, str):
        value = parse_json(value)
    if not isinstance(value, (list, tuple)):
        raise ValueError
    if len(value) > MAX_TOKEN_IDS:
        raise NotExact(f"which holds {len(value)} ids")
    converted = tuple(integer(item) for item in value)
    for token_id in (min(converted, default=0), max(converted, default=0)):
        if not 0 <= token_id <= MAX_INT32:
            raise NotExact(f"which holds {token_id}")
    return converted


def logit_biases(value: Any) -> tuple[tuple[int, float], ...]:
    """Convert an object of token id to bias, or a list of such pairs, to pairs."""
    if isinstance(value, str):
        value = parse_json(value)
    pairs = list(value.items()) if isinstance(value, dict) else value
    if not isinstance(pairs, (list, tuple)) or not all(isinstance(pair, (list, tuple)) for pair in pairs):
        raise ValueError
    if len(pairs) > MAX_LOGIT_BIASES:
        raise NotExact(f"which holds {len(pairs)} biases")
    converted = tuple((integer(token_id), number(bias)) for token_id, bias in pairs)
    seen: set[int] = set()
    for token_id, bias in converted:
        if not are_logit_biases(((token_id, bias),)):
            raise NotExact(f"which holds {token_id}: {bias:g}")
        if token_id in seen:
            raise NotExact(f"which holds {token_id} twice")
        seen.add(token_id)
    return converted


def are_logit_biases(pairs: tuple[tuple[int, float], ...]) -> bool:
    """Whether these are allowed biases of different tokens."""
    in_range = all(0 <= token_id <= MAX_INT32 and abs(bias) <= MAX_LOGIT_BIAS for token_id, bias in pairs)
    return in_range and len(dict(pairs)) == len(pairs) <= MAX_LOGIT_BIASES


def texts(value: Any) -> tuple[str, ...]:
    """Convert one string or a list of strings; drop empty ones."""
    items = [value] if isinstance(value, str) else value
    if isinstance(value, str) and value.startswith("["):  # either a JSON list or a string that begins with a bracket
        with contextlib.suppress(ValueError):
            parsed = parse_json(value)
            items = parsed if all(isinstance(item, str) for item in parsed) else items
    if not isinstance(items, (list, tuple)):
        raise ValueError
    return tuple(text(item) for item in items if item != "")


def boolean_or_count(value: Any) -> bool:
    """Convert a boolean or a count: a count above 0 is true, 0 is false."""
    try:
        return boolean(value)
    except ValueError:
        if (count := integer(value)) < 0:
            raise
        return count > 0


def log_prob_count(value: Any) -> int:
    """Convert `logprobs`, the number of log probabilities beside the sampled token's; true is 0, and false is -1."""
    boolean_or_count(value)  # raises an error for a number below 0
    return count_or_boolean(value)


def count_or_boolean(value: Any) -> int:
    """Convert a count; true is 0, and false is -1, which stands for none."""
    if isinstance(value, bool) or str(value).strip().lower() in ("true", "false"):
        return 0 if boolean(value) else -1
    return integer(value)


SCALARS = (boolean, integer, number, boolean_or_count, log_prob_count, count_or_boolean)

# Rows


def _bool(**names: Any) -> Option:
    return Option(boolean, "true or false (or 1 or 0)", **names)


def _int(least: int, most: int, below: str = "", lowest: int | None = None, **names: Any) -> Option:
    """An integer option. below: the meaning of the values from `lowest` to `least`, for the message."""
    allowed = f"{below}an integer from {least} to {most}"
    return Option(integer, allowed, lambda v: (least if lowest is None else lowest) <= v <= most, **names)


def _only(convert: Callable[[Any], Any], value: Any, why: str, **names: Any) -> Option:
    """An option of other servers that allows one value only."""
    return Option(convert, f"{json.dumps(value)} ({why})", lambda v: v == value, **names)


def _empty(why: str, convert: Callable[[Any], Any] = lambda value: value, **names: Any) -> Option:
    return Option(convert, f"empty ({why})", lambda v: v in ("", "[]", "{}", (), [], {}), **names)


def _null(why: str) -> Option:
    """An option of other servers that allows no value; null counts as absent."""
    return Option(lambda value: value, f"null ({why})", lambda v: False)


def _without_effect(convert: Callable[[Any], Any], what: str, why: str, **names: Any) -> Option:
    return Option(convert, f"{what} ({why})", **names)


_BOOL, _INT32, _FP32, _STRING, _STRINGS = ("BOOL", 1), ("INT32", 1), ("FP32", 1), ("STRING", 1), ("STRING", -1)

OPTIONS: dict[str, Option] = {
    "text_input": Option(
        text, "a string that is not empty", lambda v: v != "", _STRING, aliases=("inputs",),
        help="The prompt, at most max_prompt_bytes of UTF-8; either this or input_ids.",
    ),
    "input_ids": Option(
        token_ids, f"a list of 1 to {MAX_TOKEN_IDS} ids of the model's vocabulary, ≥ 0",
        lambda v: len(v) > 0, ("INT32", -1),
        help="The prompt as token ids.",
    ),
    "stream": _bool(
        tensor=_BOOL, keys=("streaming",),
        help="Send the tokens as they come, in several responses.",
    ),
    "max_tokens": Option(
        integer, f"-1 (as many as fit), 0 (with prompt_logprobs), or an integer from 1 to {MAX_INT32}",
        lambda v: AS_MANY_AS_FIT <= v <= MAX_INT32, _INT32, keys=("max_new_tokens",),
        help="Tokens to generate at most; with the prompt at most max_req_total_len.",
    ),
    "do_sample": _bool(
        tensor=_BOOL,
        help="Draw tokens instead of the likeliest (default: true if temperature > 0, top_p or top_k is given).",
    ),
    "temperature": Option(
        number, "a finite temperature ≥ 0", lambda v: 0 <= v < math.inf, _FP32,
        help="Flattens (> 1) or sharpens (< 1) the distribution; 0 takes the likeliest token.",
    ),
    "top_p": Option(
        number, "0 < top_p ≤ 1", lambda v: 0 < v <= 1, _FP32,
        help="Draw from the likeliest tokens that together have this probability.",
    ),
    "top_k": _int(
        1, MAX_INT32, "-1 or 0 (off), or ", lowest=-1, tensor=_INT32,
        help="Draw from this many of the likeliest tokens.",
    ),
    "min_p": Option(
        number, "0 ≤ min_p ≤ 1", lambda v: 0 <= v <= 1, _FP32,
        help="Draw from tokens at least min_p times as likely as the likeliest, before top_k and top_p.",
    ),
    "presence_penalty": Option(
        number, "a finite number", math.isfinite, _FP32,
        help="Subtracted from the logit of each token generated before.",
    ),
    "frequency_penalty": Option(
        number, "a finite number", math.isfinite, _FP32,
        help="Subtracted from the logit of a token once for each time it was generated.",
    ),
    "repetition_penalty": Option(
        number, "a finite number > 0", lambda v: 0 < v < math.inf, _FP32,
        help="Divides the likelihood of tokens of the prompt and the answer.",
    ),
    "logit_bias": Option(
        logit_biases,
        f"an object (or a list of pairs) of at most {MAX_LOGIT_BIASES} ids of the model's vocabulary, ≥ 0, with biases"
        f" from -{MAX_LOGIT_BIAS:g} to {MAX_LOGIT_BIAS:g}",
        are_logit_biases, _STRING,
        help="Added to the logits of these token ids, before penalties; as JSON in the tensor and in parameters.",
    ),
    "seed": _int(
        0, 2**64 - 1, "-1 (drawn), or ", lowest=-1, tensor=("UINT64", 1), aliases=("random_seed",),
        help="The same seed gives the same draw (default: drawn). The tensor cannot hold -1.",
    ),
    "min_tokens": _int(
        0, MAX_INT32, tensor=_INT32, aliases=("min_length",), keys=("min_new_tokens",),
        help="Ignore EOS, stop ids and stop words until this many tokens; at most max_tokens.",
    ),
    "ignore_eos": _bool(
        tensor=_BOOL,
        help="Go on after the model's end of sequence.",
    ),
    "stop_words": Option(
        texts, f"a string or a list of at most {MAX_STOP_WORDS} strings of at most {MAX_STOP_WORD_BYTES} bytes",
        lambda v: len(v) <= MAX_STOP_WORDS and all(len(w.encode()) <= MAX_STOP_WORD_BYTES for w in v),
        _STRINGS, aliases=("stop", "stop_sequences"),
        help="End before any of these texts.",
    ),
    "stop_token_ids": Option(
        token_ids, f"a list of at most {MAX_STOP_TOKEN_IDS} ids of the model's vocabulary, ≥ 0",
        lambda v: len(v) <= MAX_STOP_TOKEN_IDS,
        ("INT32", -1), aliases=("stop_ids",),
        help="End with any of these ids, even with ignore_eos.",
    ),
    "end_id": _int(
        0, MAX_INT32, "-1 (none: EOS is ignored), or ", lowest=-1, tensor=_INT32,
        help="One more of stop_token_ids.",
    ),
    "exclude_input_in_output": _bool(
        tensor=_BOOL,
        help="Leave the prompt out of the answer.",
    ),
    "parse_special": _bool(
        tensor=_BOOL,
        help="Take special tokens in the prompt as tokens, not as text.",
    ),
    "skip_special_tokens": _bool(
        tensor=_BOOL,
        help="Leave special tokens out of the answer.",
    ),
    "structured_output": Option(
        structured_output.structured_output,
        f"a JSON object, as an object or text of at most {structured_output.MAX_BYTES} bytes, with exactly one of "
        "json_schema (an object or text), json_object (true), regex, choice (a list of texts) and grammar",
        tensor=_STRING,
        help="What the answer must follow: JSON with json_schema, json_object, regex, choice or grammar.",
    ),
    "allowed_token_ids": Option(
        token_ids, f"a list of at most {MAX_TOKEN_IDS} ids of the model's vocabulary, ≥ 0", tensor=("INT32", -1),
        help="Draw from these tokens only; not beside structured_output.",
    ),
    "guided_json": Option(
        structured_output.of_kind("json_schema"), "a JSON Schema, as an object or text",
        help="As structured_output with json_schema.",
    ),
    "guided_regex": Option(
        structured_output.of_kind("regex"), "a regular expression", keys=("regular_constraint",),
        help="As structured_output with regex.",
    ),
    "guided_choice": Option(
        structured_output.of_kind("choice"), f"a list of at most {structured_output.MAX_CHOICES} texts",
        help="As structured_output with choice; for Triton server's generate within sampling_parameters.",
    ),
    "guided_grammar": Option(
        structured_output.of_kind("grammar"), "a grammar, in Lark's or GBNF's notation",
        help="As structured_output with grammar.",
    ),
    "response_format": Option(
        structured_output.response_format,
        "an object whose type is text, json_object, or json_schema with json_schema.schema",
        help="OpenAI's object; as structured_output with json_object or json_schema.",
    ),
    "structured_outputs": Option(
        structured_output.vllm_structured_outputs,
        "an object with exactly one of json, json_object (true), regex, choice and grammar",
        keys=("guided_decoding",),
        help="vLLM's object; as structured_output.",
    ),
    "guided_decoding_guide_type": Option(
        text, "json, json_schema, regex or ebnf_grammar", tensor=_STRING,
        help="With guided_decoding_guide, TensorRT-LLM's: as structured_output.",
    ),
    "guided_decoding_guide": Option(
        text, f"a text of at most {structured_output.MAX_BYTES} bytes", tensor=_STRING,
        help="What guided_decoding_guide_type says: a JSON Schema, a regular expression or a grammar.",
    ),
    "return_log_probs": Option(
        boolean_or_count, "true, false or a count (0 is false)", tensor=_BOOL, aliases=("return_logprobs",),
        help="Ask for the log probability of each new token.",
    ),
    "logprobs": Option(
        log_prob_count, f"true, false or a count from 0 to {MAX_TOP_LOG_PROBS}", lambda v: v <= MAX_TOP_LOG_PROBS,
        help="Asks for log probabilities too, and a count is top_logprobs; return_log_probs: false overrides it.",
    ),
    "top_logprobs": _int(
        0, MAX_TOP_LOG_PROBS, tensor=_INT32,
        help="So many of the likeliest tokens beside each new one; asks for log probabilities too.",
    ),
    "prompt_logprobs": Option(
        count_or_boolean, f"true, false (or -1), or an integer from 0 to {MAX_TOP_LOG_PROBS}",
        lambda v: -1 <= v <= MAX_TOP_LOG_PROBS, _INT32,
        help="Log probabilities of the prompt and of this many likeliest tokens; -1: none.",
    ),
    "n": _int(
        1, MAX_ANSWERS, tensor=_INT32, aliases=("num_return_sequences",),
        help="Answers to make to the prompt, which is computed once; answer i draws with seed + i.",
    ),
    "return_cumulative_logprob": _bool(tensor=_BOOL, help="Asks for log probabilities too."),
    "return_details": _bool(help="Asks for log probabilities too."),
    "tenant": Option(
        text, f"a string of at most {MAX_TENANT_LENGTH} characters, without control characters and line breaks",
        lambda v: len(v) <= MAX_TENANT_LENGTH and not _CONTROL_CHARACTERS.search(v), _STRING,
        help="Whose share of the server the request takes; requests that name no tenant share one.",
    ),
    "priority": _int(
        # Triton server keeps a request parameter `priority` to itself, so that needs another name.
        -MAX_PRIORITY, MAX_PRIORITY, tensor=_INT32, keys=("request_priority",),
        help="The lowest of a tenant's waiting requests goes first; a level is worth 10 s of waiting.",
    ),
}  # fmt: skip

_ALWAYS_THERE = "that output is always there"
_NO_BEAM_SEARCH = "there is no beam search"
_NO_BEAMS = "of use in beam search only"
_NO_LOGITS = "logits are not returned"
_BIAS_BY_ID = "logit_bias takes token ids"
_NO_DRAFT = "there is no draft model"
_NO_ADAPTER = "there are no LoRA adapters"

# Options of other servers, for their clients.
OTHERS: dict[str, Option] = {
    "return_num_input_tokens": _without_effect(boolean, "true or false", _ALWAYS_THERE, tensor=_BOOL),
    "return_num_output_tokens": _without_effect(boolean, "true or false", _ALWAYS_THERE, tensor=_BOOL),
    "return_finish_reason": _without_effect(boolean, "true or false", _ALWAYS_THERE, tensor=_BOOL),
    "best_of": Option(integer, "the value of n (the best of more is not chosen)", lambda v: 1 <= v <= MAX_ANSWERS),
    "beam_width": _only(integer, 1, _NO_BEAM_SEARCH, tensor=_INT32),
    "use_beam_search": _only(boolean, False, _NO_BEAM_SEARCH),
    "length_penalty": _without_effect(number, "any number", _NO_BEAMS, tensor=_FP32),
    "early_stopping": _without_effect(boolean, "true or false", _NO_BEAMS),
    "pad_id": _without_effect(integer, "any integer", "nothing is padded", tensor=_INT32),
    "bad_words": _empty("words cannot be banned", texts, tensor=_STRINGS),
    "embedding_bias_words": _empty(_BIAS_BY_ID, texts, tensor=_STRINGS),
    "embedding_bias_weights": _empty(_BIAS_BY_ID, tensor=("FP32", -1)),
    "return_context_logits": _only(boolean, False, _NO_LOGITS, tensor=_BOOL),
    "return_generation_logits": _only(boolean, False, _NO_LOGITS, tensor=_BOOL),
    "return_perf_metrics": _only(boolean, False, "the metrics endpoint has them", tensor=_BOOL),
    "num_draft_tokens": _only(integer, 0, _NO_DRAFT, tensor=_INT32),
    "use_draft_logits": _only(boolean, False, _NO_DRAFT, tensor=_BOOL),
    "prompt_vocab_size": _only(integer, 0, "there are no prompt embeddings", tensor=_INT32),
    "lora_task_id": _only(integer, 0, _NO_ADAPTER, tensor=("UINT64", 1)),
    "lora_name": _empty(_NO_ADAPTER),
    "truncate_prompt_tokens": _null("prompts are not truncated"),
    "detokenize": _only(boolean, True, "the text is always there"),
    "include_stop_str_in_output": _only(boolean, False, "a stop string is never in the output"),
    "print_eos_token": _only(boolean, False, "EOS is never in the text"),
    "add_special_tokens": _only(boolean, True, "the model's tokenizer decides; input_ids are taken as they are"),
    "spaces_between_special_tokens": _without_effect(
        boolean, "true or false", "no spaces are added", keys=("add_spaces_between_special_tokens",)
    ),
    "input_penalty": _only(boolean, False, "presence and frequency penalties count generated tokens"),
    "exponential_decay_length_penalty": Option(
        lambda v: number(v[1]), "[any, 1.0] (there is no penalty of length)", lambda v: v == 1
    ),
    "image_max_patch_num": _only(integer, -1, "there are no images"),
    "suggested_dp_index": _only(integer, -1, "the server schedules"),
}
ALL_OPTIONS = OPTIONS | OTHERS
CANONICAL = {name: first for first, option in ALL_OPTIONS.items() for name in (first, *option.other_names)}
# The type and the size of each input tensor, by name.
OPTION_TENSORS = {
    name: option.tensor for first, option in ALL_OPTIONS.items() if option.tensor for name in (first, *option.aliases)
}
