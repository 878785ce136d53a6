# SPDX-License-Identifier: Apache-2.0
"""Reads the body of a request to LightLLM's API. docs/lightllm_api.md lists the parameters.

The option table (option_table.py) knows LightLLM's names and checks their values. Here is what only this API has:
LightLLM's defaults and limits, and the parameters that never reach the engine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from lightllm_backend.option_table import MAX_INT32, OPTIONS
from lightllm_backend.options import parse_request, show
from lightllm_backend.request import DEFAULTS, RequestError, RequestOptions
from lightllm_client.options import DATATYPES, Options

FIELDS = ("inputs", "parameters", "multimodal_params")
# The parameters of LightLLM's server, in the order of its documentation.
LIGHTLLM_PARAMETERS = (
    *("best_of", "n", "do_sample", "presence_penalty", "frequency_penalty", "repetition_penalty"),
    *("exponential_decay_length_penalty", "temperature", "top_p", "top_k", "ignore_eos"),
    *("max_new_tokens", "min_new_tokens", "stop_sequences", "skip_special_tokens", "add_special_tokens"),
    *("add_spaces_between_special_tokens", "print_eos_token", "input_penalty"),
    *("regular_constraint", "guided_grammar", "guided_json", "allowed_token_ids", "return_details"),
    *("group_request_id", "suggested_dp_index", "move_kv_to_decode_node", "image_max_patch_num"),
)
# Those that become the engine's structured_output.
CONSTRAINTS = ("regular_constraint", "guided_grammar", "guided_json")
# What LightLLM's server has not.
OWN_PARAMETERS = ("seed", "tenant", "priority")
# They are read here; the option table reads the rest.
_READ_HERE = ("best_of", "n", "add_special_tokens", "return_details", "group_request_id", "move_kv_to_decode_node")
MAX_ANSWERS = 8
# LightLLM takes a lower temperature for 0, which means greedy.
LOWEST_TEMPERATURE = 1e-5
# Values of max_new_tokens; the engine's max_tokens may also be -1 or, with prompt_logprobs, 0.
_ALLOWED_LENGTHS = f"an integer from 1 to {MAX_INT32}"


@dataclass(frozen=True)
class GenerateRequest:
    """A request to /generate or /generate_stream.

    return_details: whether the entries of the tokens are wanted. constrained_by: the parameter that constrains the
    answer, if one does.
    """

    prompt: str | tuple[int, ...]
    options: Options
    add_special_tokens: bool
    return_details: bool
    constrained_by: str = ""

    @property
    def n(self) -> int:
        """How many answers it wants. The engine gives answer i the seed + i."""
        return self.options.get("n", 1)


def read_generate_request(
    body: Mapping[str, Any], tenant: str = "", defaults: Mapping[str, Any] | None = None
) -> GenerateRequest:
    """Read a body; raise RequestError INVALID_ARG for what LightLLM refuses, and for what this server cannot do.

    tenant: that of the request's API key, which wins over the parameter of that name. defaults: the model's own.
    """
    for name in body:
        if name not in FIELDS:
            raise refusal(f"{show(name)} is not a field; allowed: {', '.join(FIELDS)}")
    if "inputs" not in body:
        raise refusal("inputs is missing; allowed: a text, or a list of token ids")
    if not isinstance(body["inputs"], (str, list)):
        raise refusal(f"inputs is {show(body['inputs'])}; allowed: a text, or a list of token ids")
    parameters = _object("parameters", body.get("parameters"))
    for name, value in _object("multimodal_params", body.get("multimodal_params")).items():
        if value:
            place = "multimodal_params." + show(name).strip('"')
            raise refusal(f"{place} is {show(value)}; allowed: empty (the models take text alone)")
    known = (*LIGHTLLM_PARAMETERS, *OWN_PARAMETERS)
    for name in parameters:
        if name not in known:
            raise refusal(f"{show(name)} is not a parameter; allowed: {', '.join(known)}")
    n = _number_of_answers(parameters)
    if parameters.get("move_kv_to_decode_node") is not None:
        raise refusal("move_kv_to_decode_node is given; allowed: null (one server computes prompts and answers)")
    if tenant:
        parameters["tenant"] = tenant
    add_special_tokens = read_boolean(parameters, "add_special_tokens", True)
    return_details = read_boolean(parameters, "return_details", False)
    prompt, parsed = _parse(body["inputs"], {**_possible(defaults or {}), **parameters})
    options = _client_options(parsed, "seed" in parameters)
    if n > 1:
        options["n"] = n
    if return_details:
        options["return_log_probs"] = True
    constrained_by = next((name for name in CONSTRAINTS if parameters.get(name)), "")
    return GenerateRequest(prompt, options, add_special_tokens, return_details, constrained_by)


def _possible(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the model's defaults that a parameter of LightLLM can have."""
    is_impossible = {"top_k": lambda value: value == 0, "repetition_penalty": lambda value: value < 1}
    return {
        name: value
        for name, value in defaults.items()
        if name in LIGHTLLM_PARAMETERS and not (name in is_impossible and is_impossible[name](value))
    }


def refusal(message: str) -> RequestError:
    return RequestError("INVALID_ARG", message)


def read_boolean(parameters: Mapping[str, Any], name: str, default: bool) -> bool:
    """Return a parameter that is true or false; raise RequestError for any other value."""
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise refusal(f"{name} is {show(value)}; allowed: true or false")
    return value


def _object(name: str, value: Any) -> dict[str, Any]:
    """Return a copy of a JSON object without null values; null is an empty one."""
    if value is not None and not isinstance(value, dict):
        raise refusal(f"{name} is {show(value)}; allowed: an object")
    return {key: item for key, item in (value or {}).items() if item is not None}


def _number_of_answers(parameters: Mapping[str, Any]) -> int:
    best_of = parameters.get("best_of", 1)
    n = parameters.get("n", best_of)
    for name, value in (("best_of", best_of), ("n", n)):
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_ANSWERS:
            raise refusal(f"{name} is {show(value)}; allowed: an integer from 1 to {MAX_ANSWERS}")
    if n != best_of:
        raise refusal(f"n is {n} and best_of is {best_of}; allowed: the same number (every answer is returned)")
    return int(n)


def _parse(inputs: Any, parameters: Mapping[str, Any]) -> tuple[str | tuple[int, ...], RequestOptions]:
    """Read the prompt and what the option table knows, then apply LightLLM's own rules."""
    values = {name: value for name, value in parameters.items() if name not in _READ_HERE}
    values["do_sample"] = values.get("do_sample", False)
    stop_texts, stop_ids = _split_stop_sequences(values.pop("stop_sequences", []))
    given: dict[str, Any] = {"inputs": inputs} if isinstance(inputs, str) else {"input_ids": inputs}
    try:
        tensors = {**given, "stop_sequences": stop_texts, "stop_token_ids": stop_ids}
        parsed = parse_request(tensors, json.dumps(values))
    except RequestError as error:
        message = error.message.replace("input_ids", "inputs", 1)
        raise refusal(message.replace(OPTIONS["max_tokens"].allowed, _ALLOWED_LENGTHS)) from None
    sampling = parsed.options.sampling
    if sampling.max_tokens < 1:
        raise refusal(f"max_new_tokens is {sampling.max_tokens}; allowed: {_ALLOWED_LENGTHS}")
    if "min_new_tokens" in values:
        if sampling.min_tokens < 1:
            raise refusal(f"min_new_tokens is {sampling.min_tokens}; allowed: an integer from 1 to max_new_tokens")
        # LightLLM counts the end of sequence, min_tokens does not.
        sampling = replace(sampling, min_tokens=sampling.min_tokens - 1)
    for name, least in (("presence_penalty", 0.0), ("frequency_penalty", 0.0), ("repetition_penalty", 1.0)):
        if getattr(sampling, name) < least:
            raise refusal(f"{name} is {getattr(sampling, name)}; allowed: a number ≥ {least:g}")
    if sampling.do_sample and sampling.top_k == 0:
        raise refusal("top_k is 0; allowed: -1 (off), or an integer ≥ 1")
    if not sampling.do_sample or sampling.temperature < LOWEST_TEMPERATURE:
        sampling = replace(sampling, do_sample=False, temperature=1.0, top_p=1.0, top_k=-1)
    prompt = parsed.text if parsed.text is not None else parsed.token_ids
    assert prompt is not None, "parse_request gives one of the two"
    return prompt, replace(parsed.options, sampling=sampling)


def _split_stop_sequences(value: Any) -> tuple[Any, list[int]]:
    """Split stop sequences into those that are texts and those that are one token."""
    if not isinstance(value, list):
        return value, []
    texts, token_ids = [], []
    for sequence in value:
        if not isinstance(sequence, list):
            texts.append(sequence)
        elif len(sequence) == 1:
            token_ids.append(sequence[0])
        elif sequence:
            raise refusal(f"stop_sequences holds {show(sequence)}; allowed: texts, and lists of one token id")
    return texts, token_ids


def _client_options(options: RequestOptions, has_seed: bool) -> Options:
    """Return the options that differ from the engine's defaults, and do_sample, whose default depends on others."""
    values = {**vars(options), **vars(options.sampling)}
    chosen = {name: values[name] for name, default in DEFAULTS.items() if values[name] != default}
    for name in chosen:
        if name not in DATATYPES:
            raise refusal(f"{name} is {show(values[name])}; allowed: {show(DEFAULTS[name])}")
    chosen["do_sample"] = values["do_sample"]
    if has_seed:
        chosen["seed"] = values["seed"]
    return cast(Options, chosen)
