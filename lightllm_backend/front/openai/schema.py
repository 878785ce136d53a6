# SPDX-License-Identifier: Apache-2.0
"""The bodies of OpenAI's API, with the fields that vLLM adds. docs/openai_api.md lists them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    JsonValue,
    ValidationError,
    WrapValidator,
)
from pydantic_core import CoreSchema, PydanticCustomError

from lightllm_backend.option_table import (
    MAX_INT32,
    MAX_PRIORITY,
    MAX_STOP_WORD_BYTES,
    MAX_STOP_WORDS,
    MAX_TOKEN_IDS,
)
from lightllm_backend.request import MAX_LOGIT_BIASES, MAX_STOP_TOKEN_IDS, MAX_TOP_LOG_PROBS
from lightllm_backend.structured_output import MAX_CHOICES

MAX_COPIES = 128
MAX_PROMPTS = 2048


def allows(allowed: str) -> WrapValidator:
    """Give a field one message for all wrong values, instead of one for each branch of its type."""

    def check(value: Any, handler: Any) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise PydanticCustomError("not_allowed", "{allowed}", {"allowed": allowed}) from None

    return WrapValidator(check)


@dataclass(frozen=True)
class Range:
    """The numbers that a field may have, which a refusal names whole. exclusive: without the least."""

    least: float
    most: float
    exclusive: bool = False

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        kind = "a whole number" if source == (int | None) else "a number"
        bounds = Field(gt=self.least, le=self.most) if self.exclusive else Field(ge=self.least, le=self.most)
        words = f"above {self.least} and up to" if self.exclusive else f"from {self.least} to"
        told = allows(f"{kind} {words} {self.most}")
        return handler(Annotated[source, bounds, told])


def _only(why: str, *values: Any) -> Any:
    """Make the type of a field that may only have values that change nothing; null is one of them."""
    kind: Any = Literal[values] | None if values else None
    return Annotated[kind, allows(" or ".join([*map(json.dumps, values), "null"]) + f" ({why})")]


_Id = Annotated[int, Field(ge=0, le=MAX_INT32)]
_Ids = Annotated[list[_Id], Field(min_length=1, max_length=MAX_TOKEN_IDS, fail_fast=True)]
_Text = Annotated[str, Field(min_length=1)]
_Texts = Annotated[list[_Text], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
_Prompts = Annotated[list[_Ids], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
Prompt = Annotated[
    _Text | _Texts | _Ids | _Prompts,
    allows(f"text, a list of token ids, or a list of at most {MAX_PROMPTS} of either, none of them empty"),
]
Stop = Annotated[
    str | Annotated[list[str], Field(max_length=MAX_STOP_WORDS)] | None,
    allows(f"a string, or a list of at most {MAX_STOP_WORDS} strings of at most {MAX_STOP_WORD_BYTES} bytes"),
]
_Bias = Annotated[float, Field(ge=-100, le=100)]
_Biases = Annotated[
    Annotated[dict[Annotated[str, Field(pattern="^[0-9]+$")], _Bias], Field(max_length=MAX_LOGIT_BIASES)] | None,
    allows(f"an object of at most {MAX_LOGIT_BIASES} token ids, each with a number from -100 to 100"),
]
_Object = dict[str, JsonValue]
# What may constrain an answer, by its kind.
ALLOWED_CONSTRAINTS = {
    "json": "a JSON schema, as an object or as text",
    "json_object": "true or false",
    "regex": "a regular expression, not empty",
    "choice": f"a list of 1 to {MAX_CHOICES} texts, none of them empty",
    "grammar": "a grammar, not empty",
}
_Schema = Annotated[_Object | str | None, allows(ALLOWED_CONSTRAINTS["json"])]
_Pattern = Annotated[_Text | None, allows(ALLOWED_CONSTRAINTS["regex"])]
_Grammar = Annotated[_Text | None, allows(ALLOWED_CONSTRAINTS["grammar"])]
_Choices = Annotated[
    Annotated[list[_Text], Field(min_length=1, max_length=MAX_CHOICES)] | None, allows(ALLOWED_CONSTRAINTS["choice"])
]
_AllowedIds = Annotated[_Ids | None, allows(f"a list of 1 to {MAX_TOKEN_IDS} token ids")]
_StopIds = Annotated[
    Annotated[list[_Id], Field(max_length=MAX_STOP_TOKEN_IDS)] | None,
    allows(f"a list of at most {MAX_STOP_TOKEN_IDS} token ids"),
]
_WithoutEffect = Annotated[JsonValue, Field(description="Accepted, without effect.")]


class _Strict(BaseModel):
    """A JSON object with these fields only, each of exactly its type."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(_Strict):
    """What a stream tells beside the answer."""

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False
    include_obfuscation: _WithoutEffect = None  # padding of events, which hides the lengths of tokens


class JsonSchema(_Strict):
    """The schema of `response_format`."""

    name: str
    description: str | None = None
    schema_: Annotated[
        _Object | Literal[True] | None, allows("a JSON schema: an object or true"), Field(alias="schema")
    ] = None
    strict: bool | None = None


class ResponseFormat(_Strict):
    """The form that the answer must have."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(_Strict):
    """vLLM's name for a constraint of the answer: exactly one of these."""

    json_: Annotated[_Schema, Field(alias="json")] = None
    regex: _Pattern = None
    choice: _Choices = None
    grammar: _Grammar = None
    json_object: bool | None = None
    structural_tag: _only("it is not supported") = None  # type: ignore[valid-type]


class SamplingFields(_Strict):
    """The fields that completions and chat completions share."""

    model: str | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Annotated[int | None, Range(1, MAX_COPIES)] = 1
    best_of: int | None = None
    seed: Annotated[int | None, Range(-(2**63), 2**64 - 1)] = None
    temperature: Annotated[float | None, Range(0, 100)] = None
    top_p: Annotated[float | None, Range(0, 1, exclusive=True)] = None
    top_k: Annotated[int | None, Range(-1, MAX_INT32)] = None
    min_p: Annotated[float | None, Range(0, 1)] = None
    presence_penalty: Annotated[float | None, Range(-2, 2)] = None
    frequency_penalty: Annotated[float | None, Range(-2, 2)] = None
    repetition_penalty: Annotated[float | None, Range(0, 100, exclusive=True)] = None
    logit_bias: _Biases = None
    allowed_token_ids: _AllowedIds = None
    stop: Stop = None
    stop_token_ids: _StopIds = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int | None, Range(0, MAX_INT32)] = None
    skip_special_tokens: bool | None = None
    priority: Annotated[int | None, Range(-MAX_PRIORITY, MAX_PRIORITY)] = None

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: _Schema = None
    guided_regex: _Pattern = None
    guided_choice: _Choices = None
    guided_grammar: _Grammar = None

    user: _WithoutEffect = None
    metadata: _WithoutEffect = None
    store: _WithoutEffect = None
    service_tier: _WithoutEffect = None
    safety_identifier: _WithoutEffect = None
    prompt_cache_key: _WithoutEffect = None
    prompt_cache_options: _WithoutEffect = None
    prompt_cache_retention: _WithoutEffect = None
    request_id: _WithoutEffect = None
    spaces_between_special_tokens: _WithoutEffect = None
    guided_decoding_backend: _WithoutEffect = None

    use_beam_search: _only("there is no beam search", False) = None  # type: ignore[valid-type]
    length_penalty: _only("there is no beam search", 1, 1.0) = None  # type: ignore[valid-type]
    bad_words: _only("words cannot be banned") = None  # type: ignore[valid-type]
    include_stop_str_in_output: _only("a stop string is never in the output", False) = None  # type: ignore[valid-type]
    truncate_prompt_tokens: _only("prompts are not truncated") = None  # type: ignore[valid-type]
    prompt_logprobs: _only("use echo and logprobs of /v1/completions") = None  # type: ignore[valid-type]
    return_tokens_as_token_ids: _only("tokens are text here", False) = None  # type: ignore[valid-type]
    return_token_ids: _only("LightLLM's /generate returns ids", False) = None  # type: ignore[valid-type]
    logits_processors: _only("they are not supported") = None  # type: ignore[valid-type]
    cache_salt: _only("see the setting prefix_cache") = None  # type: ignore[valid-type]
    kv_transfer_params: _only("they are not supported") = None  # type: ignore[valid-type]
    vllm_xargs: _only("they are not supported") = None  # type: ignore[valid-type]


class CompletionRequest(SamplingFields):
    """The body of POST /v1/completions."""

    prompt: Prompt
    max_tokens: Annotated[int | None, Range(0, MAX_INT32)] = 16
    echo: bool | None = False
    logprobs: Annotated[int | None, Range(0, MAX_TOP_LOG_PROBS)] = None
    suffix: _only("text cannot be inserted") = None  # type: ignore[valid-type]
    add_special_tokens: _only("the model's tokenizer decides", True) = None  # type: ignore[valid-type]


def _check_parts(content: Any) -> Any:
    """Refuse parts that are not text by the names of their types."""
    for part in content if isinstance(content, list) else ():
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind not in ("text", "refusal"):
            raise PydanticCustomError("part", "parts of type text only, not {kind}", {"kind": kind[:40]})
    return content


class TextPart(BaseModel):
    """A part of a message's content."""

    model_config = ConfigDict(strict=True, extra="allow")

    type: Literal["text", "refusal"]
    text: str | None = None
    refusal: str | None = None


class FunctionCall(BaseModel):
    """The function that an earlier answer has called; `arguments` is JSON."""

    model_config = ConfigDict(strict=True, extra="allow")

    name: str
    arguments: Annotated[str | _Object | None, allows("the text of a JSON object, or the object")] = None


class ToolCall(BaseModel):
    """A call of a tool in an earlier answer."""

    model_config = ConfigDict(strict=True, extra="allow")

    id: str | None = None
    type: str | None = "function"
    function: FunctionCall


class Message(BaseModel):
    """A message. Fields that are not named here go to the chat template as they are."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
    __pydantic_extra__: dict[str, JsonValue]

    role: Annotated[str, Field(min_length=1)]
    content: Annotated[
        str | list[TextPart] | None,
        allows("a string, or a list of parts {'type': 'text', 'text': …}"),
        BeforeValidator(_check_parts),
    ] = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class Function(_Strict):
    """A function that the model may call."""

    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    parameters: _Object | None = None
    strict: bool | None = None


class Tool(_Strict):
    """A tool that the model may call."""

    type: Literal["function"]
    function: Function


class NamedFunction(_Strict):
    """The name of a function."""

    name: str


class NamedTool(_Strict):
    """The tool that the model has to call."""

    type: Literal["function"]
    function: NamedFunction


class ChatCompletionRequest(SamplingFields):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_tokens: Annotated[int | None, Range(1, MAX_INT32)] = None
    max_completion_tokens: Annotated[int | None, Range(1, MAX_INT32)] = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int | None, Range(0, MAX_TOP_LOG_PROBS)] = None
    tools: list[Tool] | None = None
    tool_choice: Annotated[
        Literal["none", "auto", "required"] | NamedTool | None,
        allows("none, auto, required, or {'type': 'function', 'function': {'name': …}}"),
    ] = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    include_reasoning: bool | None = True

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = False
    chat_template: Annotated[str | None, Field(description="The name of one of the model's templates.")] = None
    chat_template_kwargs: _Object | None = None
    documents: list[_Object] | None = None

    echo: _only("it is of /v1/completions", False) = None  # type: ignore[valid-type]
    add_special_tokens: _only("the chat template has them", False) = None  # type: ignore[valid-type]
    modalities: Annotated[list[Literal["text"]] | None, allows("['text']")] = None
    audio: _only("there is no sound") = None  # type: ignore[valid-type]
    prediction: _only("there are no predictions") = None  # type: ignore[valid-type]
    functions: _only("use tools") = None  # type: ignore[valid-type]
    function_call: _only("use tool_choice") = None  # type: ignore[valid-type]
    web_search_options: _only("there is no search") = None  # type: ignore[valid-type]
    mm_processor_kwargs: _only("there are no images") = None  # type: ignore[valid-type]
