# SPDX-License-Identifier: Apache-2.0
"""The interface table in code: names, aliases, types and limits of what a request may say. Standard library only.

A value may come as a tensor, as a key of the JSON string `sampling_parameters`, or as a request parameter; a tensor
wins over the JSON, the JSON over parameters. Whatever is unknown or impossible is an INVALID_ARG that names it.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import math
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lightllm_backend.lengths import LengthLimits
from lightllm_backend.request import RequestError, RequestOptions, SamplingParams

MAX_STOP_WORDS = 32
MAX_STOP_WORD_BYTES = 1024


@dataclass(frozen=True)
class Option:
    """One row of the table. `convert` gives the typed value or raises ValueError; `holds` checks it."""

    convert: Callable[[Any], Any]
    allowed: str
    holds: Callable[[Any], bool] = lambda value: True
    aliases: tuple[str, ...] = ()


def _boolean(value: Any) -> bool:
    if isinstance(value, str):
        value = {"true": True, "1": True, "false": False, "0": False}.get(value.strip().lower())
    if isinstance(value, (bool, int)) and value in (0, 1):
        return bool(value)
    raise ValueError


def _boolean_or_count(value: Any) -> bool:
    """`logprobs` is a count for other servers' clients; any count above 0 asks for them."""
    try:
        return _boolean(value)
    except ValueError:
        count = _integer(value)
        if count < 0:
            raise
        return count > 0


def _integer(value: Any) -> int:
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d{1,20}\s*", value):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError
    return float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    value.encode()  # a lone surrogate, which JSON can spell, is a ValueError
    return value


def _token_ids(value: Any) -> tuple[int, ...]:
    if isinstance(value, str):
        value = json.loads(value)
    if not isinstance(value, (list, tuple)):
        raise ValueError
    return tuple(_integer(item) for item in value)


def _stop_words(value: Any) -> tuple[str, ...]:
    words = [value] if isinstance(value, str) else value
    if isinstance(value, str) and value.startswith("["):  # a JSON list, or a stop string that begins with a bracket
        with contextlib.suppress(ValueError):
            parsed = json.loads(value)
            words = parsed if all(isinstance(word, str) for word in parsed) else words
    if not isinstance(words, (list, tuple)):
        raise ValueError
    return tuple(_text(word) for word in words if word != "")


_STOP_WORDS_ALLOWED = f"a string or a list of at most {MAX_STOP_WORDS} strings of at most {MAX_STOP_WORD_BYTES} bytes"
_BOOL = "true or false"

OPTIONS: dict[str, Option] = {
    "text_input": Option(_text, "a string that is not empty", lambda v: v != "", aliases=("inputs",)),
    "input_ids": Option(_token_ids, "a list of token ids that is not empty", lambda v: len(v) > 0),
    "stream": Option(_boolean, _BOOL, aliases=("streaming",)),
    "max_tokens": Option(_integer, "max_tokens ≥ 1", lambda v: 1 <= v < 2**31, aliases=("max_new_tokens",)),
    "do_sample": Option(_boolean, _BOOL),
    "temperature": Option(_number, "a finite temperature ≥ 0", lambda v: 0 <= v < math.inf),
    "top_p": Option(_number, "0 < top_p ≤ 1", lambda v: 0 < v <= 1),
    "top_k": Option(_integer, "-1 or 0 (off), or top_k ≥ 1", lambda v: -1 <= v < 2**31),
    "presence_penalty": Option(_number, "a finite number", math.isfinite),
    "frequency_penalty": Option(_number, "a finite number", math.isfinite),
    "repetition_penalty": Option(_number, "a finite number > 0", lambda v: 0 < v < math.inf),
    "seed": Option(_integer, "0 ≤ seed < 2⁶⁴", lambda v: 0 <= v < 2**64, aliases=("random_seed",)),
    "min_tokens": Option(_integer, "0 ≤ min_tokens ≤ max_tokens", lambda v: 0 <= v < 2**31, aliases=("min_length",)),
    "ignore_eos": Option(_boolean, _BOOL),
    "stop_words": Option(
        _stop_words,
        _STOP_WORDS_ALLOWED,
        lambda v: len(v) <= MAX_STOP_WORDS and all(len(w.encode()) <= MAX_STOP_WORD_BYTES for w in v),
        aliases=("stop", "stop_sequences"),
    ),
    "exclude_input_in_output": Option(_boolean, _BOOL),
    "parse_special": Option(_boolean, _BOOL),
    "skip_special_tokens": Option(_boolean, _BOOL),
    "return_log_probs": Option(_boolean_or_count, "true, false or a count", aliases=("return_logprobs", "logprobs")),
}
# What other servers' clients also send. These outputs are always there:
OPTIONS |= {
    name: Option(_boolean, _BOOL)
    for name in ("return_num_input_tokens", "return_num_output_tokens", "return_finish_reason")
}
# One completion a request is what there is:
OPTIONS |= {
    name: Option(_integer, "1", lambda v: v == 1) for name in ("n", "best_of", "beam_width", "num_return_sequences")
}
_CANONICAL = {alias: name for name, option in OPTIONS.items() for alias in (name, *option.aliases)}
_SAMPLING_NAMES = tuple(SamplingParams.__dataclass_fields__)
_OPTION_NAMES = tuple(name for name in RequestOptions.__dataclass_fields__ if name != "sampling")

# Names that Triton server itself, or the launch command's probe, puts among the parameters of a request.
_RESERVED = {
    "probe_key",
    "id",
    "priority",
    "timeout",
    "binary_data_output",
    "binary_data_size",
    "headers",
    "classification",
}
_RESERVED_PREFIXES = ("sequence_", "triton_", "shared_memory_")


@dataclass(frozen=True)
class ParsedRequest:
    """A request as its sender wrote it: a text or token ids (exactly one is not None), and the options."""

    text: str | None
    token_ids: tuple[int, ...] | None
    options: RequestOptions

    def without_streaming(self) -> ParsedRequest:
        """The same request where there can be only one response."""
        return replace(self, options=replace(self.options, stream=False))


def parse_request(
    tensors: Mapping[str, Any], sampling_parameters: str | None = None, parameters: Mapping[str, Any] | None = None
) -> ParsedRequest:
    """Read a request from its three sources; raise RequestError INVALID_ARG for what is not in the table.

    tensors: plain Python values by name (scalars, str, list). sampling_parameters: a JSON object. parameters: the
    request's parameters as Triton server gives them.
    """
    values: dict[str, Any] = {}
    for source in (_parameters(parameters or {}), _json(sampling_parameters), tensors):
        values.update(_canonical(source))
    if ("text_input" in values) == ("input_ids" in values):
        both = "text_input" in values
        raise _invalid(f"{'both' if both else 'none'} of text_input and input_ids given; allowed: exactly one of them")

    if "do_sample" not in values:
        values["do_sample"] = values.get("temperature", 0.0) > 0.0 or "top_p" in values or "top_k" in values
    if "seed" not in values:
        values["seed"] = random.getrandbits(64)
    sampling = SamplingParams(**{name: values[name] for name in _SAMPLING_NAMES if name in values})
    if sampling.min_tokens > sampling.max_tokens:
        raise _invalid(
            f"min_tokens is {sampling.min_tokens}; allowed: 0 ≤ min_tokens ≤ max_tokens ({sampling.max_tokens})"
        )
    options = RequestOptions(sampling, **{name: values[name] for name in _OPTION_NAMES if name in values})
    return ParsedRequest(values.get("text_input"), values.get("input_ids"), options)


def check_prompt_bytes(size: int, max_prompt_bytes: int) -> None:
    """Refuse a prompt's text before anything is spent on it."""
    if size > max_prompt_bytes:
        raise _invalid(f"text_input has {size} bytes; allowed: at most {max_prompt_bytes} (max_prompt_bytes)")


def check_token_ids(token_ids: tuple[int, ...], vocab_size: int) -> None:
    for token_id in (min(token_ids), max(token_ids)):
        if not 0 <= token_id < vocab_size:
            raise _invalid(f"input_ids holds {token_id}; allowed: 0 ≤ id < {vocab_size}")


def check_lengths(num_input: int, max_tokens: int, limits: LengthLimits) -> None:
    """Refuse what can never run, with the three numbers that decide it and what sets the limit."""
    if num_input == 0:
        raise _invalid("the prompt has no tokens; allowed: at least 1")
    asked = f"the prompt has {num_input} tokens and max_tokens is {max_tokens}"
    if num_input > limits.max_input:
        raise _invalid(f"{asked}; allowed: at most {limits.max_input} prompt tokens ({limits.max_input_source})")
    if num_input + max_tokens > limits.max_total:
        raise _invalid(f"{asked}; allowed: at most {limits.max_total} in all ({limits.max_total_source})")


def _invalid(message: str) -> RequestError:
    return RequestError("INVALID_ARG", message)


def _parameters(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in parameters.items()
        if name not in _RESERVED and not name.startswith(_RESERVED_PREFIXES)
    }


def _json(text: str | None) -> dict[str, Any]:
    if not text:
        return {}
    try:
        values = json.loads(text)
    except ValueError as error:
        raise _invalid(f"sampling_parameters is not JSON ({error}); allowed: a JSON object") from None
    if not isinstance(values, dict):
        raise _invalid(f"sampling_parameters is {_show(values)}; allowed: a JSON object")
    return values


def _canonical(source: Mapping[str, Any]) -> dict[str, Any]:
    """The values of one source, typed and checked, under their canonical names; null means not given."""
    values: dict[str, Any] = {}
    for key, raw in source.items():
        if raw is None:
            continue
        name = _CANONICAL.get(key)
        if name is None:
            close = difflib.get_close_matches(key, _CANONICAL, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise _invalid(f"{key} is not a parameter{hint}; allowed: {', '.join(OPTIONS)}")
        if name in values:
            raise _invalid(
                f"{name} is given twice, once as {key}; allowed: one of {name}, {', '.join(OPTIONS[name].aliases)}"
            )
        option = OPTIONS[name]
        try:
            value = option.convert(raw)
            valid = option.holds(value)
        except (ValueError, OverflowError):
            valid = False
        if not valid:
            raise _invalid(f"{key} is {_show(raw)}; allowed: {option.allowed}")
        values[name] = value
    return values


def _show(value: Any) -> str:
    """A value for a message: short, whatever it is."""
    text = str(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False, default=str)
    text = text.encode(errors="replace").decode()
    return text if len(text) <= 80 else text[:77] + "…"
