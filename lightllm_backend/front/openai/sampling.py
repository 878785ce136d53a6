# SPDX-License-Identifier: Apache-2.0
"""The fields of OpenAI's API, and vLLM's, as options of the engine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lightllm_backend.client_json import NotExact
from lightllm_backend.front.errors import ApiError, refusal
from lightllm_backend.front.openai.schema import ALLOWED_CONSTRAINTS, SamplingFields
from lightllm_backend.structured_output import text_of

# Fields that are options of the engine by the same name.
_SAME = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "allowed_token_ids",
    "stop_token_ids",
    "ignore_eos",
    "min_tokens",
    "skip_special_tokens",
    "priority",
)


def engine_options(body: SamplingFields, max_tokens: int, tenant: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Translate a body's fields; raise ApiError 400 for two that contradict each other.

    defaults: the model's own. Like vLLM, we take no notice of its do_sample: OpenAI's default is to sample.
    """
    if body.stream_options is not None and not body.stream:
        given = body.stream_options.model_dump(exclude_unset=True)
        raise refusal("stream_options", given, "null, unless stream is true")
    if body.best_of not in (None, 1, body.n or 1):
        raise refusal("best_of", body.best_of, "1, the value of n, or null (n answers are made, and all are returned)")
    # The engine's own default is to take the likeliest token.
    options: dict[str, Any] = {"temperature": 1.0, **defaults, "max_tokens": max_tokens}
    options.pop("do_sample", None)
    for name in _SAME:
        value = getattr(body, name)
        if value is not None:
            options[name] = value
    if body.stop:
        options["stop_words"] = [body.stop] if isinstance(body.stop, str) else [word for word in body.stop if word]
    if body.logit_bias:
        options["logit_bias"] = json.dumps(body.logit_bias)
    if constraint := _constraint(body):
        options["structured_output"] = constraint[1]
    if tenant:
        options["tenant"] = tenant
    return options


def seeds(body: SamplingFields, number: int) -> list[int | None]:
    """Return a seed for each of the copies of an answer: `seed`, `seed` + 1 and so on, or None to draw them."""
    if body.seed is None:
        return [None] * number
    return [(body.seed + copy) % 2**64 for copy in range(number)]


def constraining_field(body: SamplingFields) -> str:
    """Return the field that constrains the answer; an empty text if there is none."""
    constraint = _constraint(body)
    return constraint[0] if constraint else ""


def _constraint_text(kind: str, value: Any, field: str) -> str:
    """Return the engine's structured_output for a kind of vLLM's; raise ApiError 400 if it cannot be asked for.

    field: of the body, which has the value.
    """
    try:
        return text_of("json_schema" if kind == "json" else kind, value)
    except NotExact as error:
        reason = f", {error}"
    except ValueError:  # half a surrogate pair
        reason = ""
    raise refusal(field, value, ALLOWED_CONSTRAINTS[kind], reason)


def _constraint(body: SamplingFields) -> tuple[str, str] | None:
    """Return the field that constrains the answer, and the constraint as the engine's structured_output."""
    found: list[tuple[str, str]] = []
    if (form := body.response_format) is not None and form.type != "text":
        field = "response_format.json_schema.schema"
        if form.type == "json_object":
            found.append(("response_format", _constraint_text("json_object", True, "response_format")))
        elif form.json_schema is None or form.json_schema.schema_ is None:
            raise ApiError(400, f"{field} is missing; allowed: a JSON schema", field)
        else:
            found.append(("response_format", _constraint_text("json", form.json_schema.schema_, field)))
    if body.structured_outputs is not None:
        given = body.structured_outputs.model_dump(by_alias=True, exclude_none=True)
        for name, value in given.items():
            if value is False:  # json_object, as in vLLM
                continue
            field = f"structured_outputs.{name}"
            found.append((field, _constraint_text(name, value, field)))
    for name in ("json", "regex", "choice", "grammar"):
        value = getattr(body, f"guided_{name}")
        if value is not None:
            found.append((f"guided_{name}", _constraint_text(name, value, f"guided_{name}")))
    # guidance sends the same constraint by vLLM's older name and by its newer one.
    names = [name for number, (name, text) in enumerate(found) if number == 0 or text != found[0][1]]
    names += ["allowed_token_ids"] * (body.allowed_token_ids is not None)
    if found and len(names) > 1:
        raise ApiError(400, f"{', '.join(names)} are given together; allowed: one of them", names[1])
    return found[0] if found else None
