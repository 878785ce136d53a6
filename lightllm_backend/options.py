# SPDX-License-Identifier: Apache-2.0
"""Reads a request from its three sources and checks it against the option table. Standard library only.

A value may come as a tensor, as a key of the JSON string `sampling_parameters`, or as a request parameter; a tensor
wins over the JSON, the JSON over parameters. An unknown name or a wrong value raises INVALID_ARG with the name.
"""

from __future__ import annotations

import difflib
import itertools
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import UnionType
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

from lightllm_backend.client_json import NotExact, parse_json
from lightllm_backend.lengths import LengthLimits
from lightllm_backend.option_table import (
    ALL_OPTIONS,
    CANONICAL,
    MAX_SCALAR_CHARACTERS,
    OPTIONS,
    SCALARS,
    Option,
)
from lightllm_backend.request import (
    AS_MANY_AS_FIT,
    MAX_STOP_TOKEN_IDS,
    Request,
    RequestError,
    RequestOptions,
    SamplingParams,
    as_tuples,
)
from lightllm_backend.structured_output import of_guide

_SAMPLING_NAMES = tuple(SamplingParams.__dataclass_fields__)
_OPTION_NAMES = tuple(name for name in RequestOptions.__dataclass_fields__ if name != "sampling")

# The types of the options' values, in order of the fields.
_PLAIN_TYPES = {
    **{name: get_type_hints(SamplingParams)[name] for name in _SAMPLING_NAMES},
    **{name: get_type_hints(RequestOptions)[name] for name in _OPTION_NAMES},
}
# Messages show at most this much of a client's text.
_SHOWN_CHARACTERS = 80
# One prompt has at most this many, with those of the likeliest tokens; with the tokens' ids they take 8 MiB.
MAX_PROMPT_LOG_PROBS = 2**20

# Request parameters that Triton server itself or the launch command's probe adds.
_RESERVED = {
    "probe_key",
    "id",
    "timeout",
    "binary_data_output",
    "binary_data_size",
    "headers",
    "classification",
}
_RESERVED_PREFIXES = ("sequence_", "triton_", "shared_memory_")


class _Given(NamedTuple):
    """A value, and the name that the client used for it."""

    value: Any
    key: str


@dataclass(frozen=True)
class ParsedRequest:
    """The prompt of a request, as text or token ids (exactly one is not None), and its checked options."""

    text: str | None
    token_ids: tuple[int, ...] | None
    options: RequestOptions

    def without_streaming(self) -> ParsedRequest:
        """Return the same request with streaming off."""
        return replace(self, options=replace(self.options, stream=False))


def parse_request(
    tensors: Mapping[str, Any], sampling_parameters: str | None = None, parameters: Mapping[str, Any] | None = None
) -> ParsedRequest:
    """Read a request from its three sources; raise RequestError INVALID_ARG for a value outside the table.

    tensors: plain Python values by name (scalars, str, list). sampling_parameters: a JSON object, which may also be one
    of the parameters. parameters: the request's parameters as Triton server gives them.
    """
    others = _parameters(parameters or {})
    as_parameter = others.pop("sampling_parameters", None)
    given: dict[str, _Given] = {}
    for source in (others, _json(sampling_parameters or as_parameter), tensors):
        given.update(_canonical(source))
    if ("text_input" in given) == ("input_ids" in given):
        both = "text_input" in given
        raise _invalid(f"{'both' if both else 'none'} of text_input and input_ids given; allowed: exactly one of them")

    values = {name: one.value for name, one in given.items()}
    _derive(values)
    values["structured_output"] = _structured_output(given)
    sampling = SamplingParams(**{name: values[name] for name in _SAMPLING_NAMES if name in values})
    if sampling.min_tokens > sampling.max_tokens != AS_MANY_AS_FIT:
        most = given["max_tokens"].key if "max_tokens" in given else "max_tokens"
        raise _invalid(
            f"{given['min_tokens'].key} is {sampling.min_tokens}; allowed: from 0 to {most} ({sampling.max_tokens})"
        )
    if sampling.max_tokens == 0 and sampling.prompt_logprobs < 0:
        raise _invalid(f"{given['max_tokens'].key} is 0; allowed: {OPTIONS['max_tokens'].allowed}")
    if "best_of" in given and values["best_of"] != sampling.n:
        raise _invalid(f"{given['best_of'].key} is {values['best_of']}; allowed: the value of n ({sampling.n})")
    options = RequestOptions(sampling, **{name: values[name] for name in _OPTION_NAMES if name in values})
    return ParsedRequest(values.get("text_input"), values.get("input_ids"), options)


def _derive(values: dict[str, Any]) -> None:
    """Set the values that follow from others."""
    if "do_sample" not in values:
        values["do_sample"] = values.get("temperature", 0.0) > 0.0 or "top_p" in values or "top_k" in values
    if values.get("seed", -1) == -1:
        values["seed"] = random.getrandbits(64)
    end_id = values.get("end_id")
    if end_id == -1:
        values["ignore_eos"] = True
    elif end_id is not None:
        stop_token_ids = values["stop_token_ids"] = (*values.get("stop_token_ids", ()), end_id)
        if len(stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise _invalid(f"stop_token_ids and end_id are {len(stop_token_ids)} ids; allowed: {MAX_STOP_TOKEN_IDS}")
    count = values.get("logprobs", -1)
    is_asked = values.get("return_log_probs", count >= 0)
    values.setdefault("top_logprobs", max(count, 0) if is_asked else 0)
    values["return_log_probs"] = (
        is_asked
        or values["top_logprobs"] > 0
        or values.get("return_cumulative_logprob", False)
        or values.get("return_details", False)
    )


# The options that ask for structured output, each in its own way.
_STRUCTURED = (
    "structured_output", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "response_format",
    "structured_outputs", "guided_decoding_guide_type",
)  # fmt: skip


def _structured_output(given: Mapping[str, _Given]) -> str:
    """Return what the answer must follow, by whichever option asks for it."""
    asking = [name for name in _STRUCTURED if name in given and given[name].value]
    guide = given.get("guided_decoding_guide", _Given("", "guided_decoding_guide"))
    if guide.value and "guided_decoding_guide_type" not in asking:
        raise _invalid(f"{guide.key} is given alone; allowed: with guided_decoding_guide_type")
    if not asking:
        return ""
    name, *others = asking
    if "allowed_token_ids" in given and given["allowed_token_ids"].value:
        others.append("allowed_token_ids")
    if others:
        raise _invalid(f"{given[others[0]].key} is given beside {given[name].key}; allowed: one of them")
    one = given[name]
    if name != "guided_decoding_guide_type":
        return str(one.value)
    try:
        return of_guide(one.value, guide.value)
    except ValueError as error:
        raise _invalid(
            f"{one.key} is {show(one.value)} with {guide.key} {show(guide.value)}, {error}; "
            f"allowed: {OPTIONS[name].allowed} with what it names"
        ) from None


def options_to_plain(options: RequestOptions) -> list[Any]:
    """Return the options' values in order of the fields, for `options_from_plain`; nothing is parsed a second time."""
    return [
        *(getattr(options.sampling, name) for name in _SAMPLING_NAMES),
        *(getattr(options, name) for name in _OPTION_NAMES),
    ]


def options_from_plain(values: list[Any]) -> RequestOptions:
    """Make the options from plain values, whose tuples may be lists. Raise ValueError unless each is what it can be."""
    if type(values) is not list or len(values) != len(_PLAIN_TYPES):
        raise ValueError("these are not the values of a request's options")
    named: dict[str, Any] = {name: as_tuples(value) for name, value in zip(_PLAIN_TYPES, values, strict=True)}
    for name, value in named.items():
        if not _has_type(value, _PLAIN_TYPES[name]) or (name in OPTIONS and not OPTIONS[name].holds(value)):
            raise ValueError(f"{name} is {show(value)}")
    sampling = SamplingParams(**{name: named[name] for name in _SAMPLING_NAMES})
    if sampling.max_tokens == 0 and sampling.prompt_logprobs < 0:
        raise ValueError("max_tokens is 0 without prompt_logprobs")
    if sampling.seed < 0 or sampling.min_tokens > sampling.max_tokens != AS_MANY_AS_FIT:
        raise ValueError(f"the seed is {sampling.seed}, min_tokens {sampling.min_tokens}")
    return RequestOptions(sampling, **{name: named[name] for name in _OPTION_NAMES})


def _has_type(value: Any, kind: Any) -> bool:
    """Whether the value is of exactly this type: a class, a union of types, or a tuple of them."""
    if isinstance(kind, UnionType):
        return any(_has_type(value, one) for one in get_args(kind))
    if get_origin(kind) is tuple:
        if type(value) is not tuple:
            return False
        first, *others = get_args(kind)
        kinds = [first] * len(value) if others == [...] else [first, *others]
        return len(value) == len(kinds) and all(map(_has_type, value, kinds))
    return type(value) is kind


def check_prompt_bytes(size: int, max_prompt_bytes: int) -> None:
    """Refuse a prompt text that is too long, before tokenizing it."""
    if size > max_prompt_bytes:
        raise _invalid(f"text_input has {size} bytes; allowed: at most {max_prompt_bytes} (max_prompt_bytes)")


def check_token_ids(name: str, token_ids: tuple[int, ...], vocab_size: int) -> None:
    for token_id in (min(token_ids, default=0), max(token_ids, default=0)):
        if not 0 <= token_id < vocab_size:
            raise _invalid(f"{name} holds {token_id}; allowed: 0 ≤ id < {vocab_size}")


def fitted(request: Request, limits: LengthLimits) -> Request:
    """Replace a max_tokens of AS_MANY_AS_FIT by what fits behind the prompt, which `check_lengths` has passed."""
    sampling = request.sampling
    if sampling.max_tokens != AS_MANY_AS_FIT:
        return request
    max_tokens = limits.max_total - len(request.prompt_ids)
    return replace(request, sampling=replace(sampling, max_tokens=max_tokens))


def check_lengths(num_input: int, max_tokens: int, limits: LengthLimits) -> None:
    """Refuse a request that can never run; the message has both lengths, the limit and its source.

    max_tokens: as the client sent it, AS_MANY_AS_FIT included, with which every prompt that fits can run.
    """
    if num_input == 0:
        raise _invalid("the prompt has no tokens; allowed: at least 1")
    asked = f"the prompt has {num_input} tokens and max_tokens is {max_tokens}"
    if num_input > limits.max_input:
        raise _invalid(f"{asked}; allowed: at most {limits.max_input} prompt tokens ({limits.max_input_source})")
    if num_input + max_tokens > limits.max_total:
        raise _invalid(f"{asked}; allowed: at most {limits.max_total} in all ({limits.max_total_source})")


def check_prompt_logprobs(num_input: int, num_top: int, vocab_size: int) -> None:
    """Refuse more log probabilities of a prompt than one response may hold, or than there are tokens to compare."""
    if num_top > vocab_size:
        raise _invalid(f"prompt_logprobs is {num_top}; allowed: at most {vocab_size}, the size of the vocabulary")
    count = num_input * (1 + num_top)
    if count > MAX_PROMPT_LOG_PROBS:
        raise _invalid(
            f"the prompt has {num_input} tokens and prompt_logprobs is {num_top}: {count} log probabilities;"
            f" allowed: at most {MAX_PROMPT_LOG_PROBS}"
        )


def show(value: Any) -> str:
    """Format any value for a message, in at most 80 characters."""
    # The rest would be formatted for nothing.
    if isinstance(value, (str, list, tuple)):
        value = value[: _SHOWN_CHARACTERS + 1]
    elif isinstance(value, dict):
        value = dict(itertools.islice(value.items(), _SHOWN_CHARACTERS + 1))
    return _short(str(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False, default=str))


def _invalid(message: str) -> RequestError:
    return RequestError("INVALID_ARG", message)


def _parameters(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in parameters.items()
        if name not in _RESERVED and not name.startswith(_RESERVED_PREFIXES)
    }


def _json(text: Any) -> dict[str, Any]:
    if text in (None, ""):
        return {}
    if not isinstance(text, str):
        raise _invalid(f"sampling_parameters is {show(text)}; allowed: the text of a JSON object")
    try:
        values = parse_json(text)
    except NotExact as error:
        raise _invalid(f"sampling_parameters is {show(text)}, {error}; allowed: a JSON object") from None
    except ValueError as error:
        raise _invalid(f"sampling_parameters is not JSON ({error}); allowed: a JSON object") from None
    if not isinstance(values, dict):
        raise _invalid(f"sampling_parameters is {show(values)}; allowed: a JSON object")
    return values


def _canonical(source: Mapping[str, Any]) -> dict[str, _Given]:
    """Convert and check the values of one source, under their canonical names; skip null values."""
    given: dict[str, _Given] = {}
    for key, raw in source.items():
        if raw is None:
            continue
        name = CANONICAL.get(key)
        if name is None:
            close = difflib.get_close_matches(key, CANONICAL, n=1) if len(key) <= _SHOWN_CHARACTERS else []
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise _invalid(f"{_short(key)} is not a parameter{hint}; allowed: {', '.join(OPTIONS)}")
        if name in given:
            names = ", ".join((name, *ALL_OPTIONS[name].other_names))
            raise _invalid(f"{key} is given beside {given[name].key}; allowed: one of {names}")
        given[name] = _Given(_checked(key, raw, ALL_OPTIONS[name]), key)
    return given


def _checked(key: str, raw: Any, option: Option) -> Any:
    """Convert the value to its type; raise INVALID_ARG if the option does not allow it."""
    reason = ""
    try:
        if isinstance(raw, str) and option.convert in SCALARS and len(raw) > MAX_SCALAR_CHARACTERS:
            raise NotExact(f"which has {len(raw)} characters")
        value = option.convert(raw)
        if option.holds(value):
            return value
    except NotExact as error:
        reason = f", {error}"
    except (ValueError, TypeError, LookupError, OverflowError):
        pass
    raise _invalid(f"{key} is {show(raw)}{reason}; allowed: {option.allowed}")


def _short(text: str) -> str:
    """Cut a client's text to 80 characters, all of which UTF-8 can spell."""
    text = text[: _SHOWN_CHARACTERS + 1].encode(errors="replace").decode()
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "…"
