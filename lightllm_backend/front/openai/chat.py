# SPDX-License-Identifier: Apache-2.0
"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator, Callable
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from lightllm_backend.client_json import NotExact
from lightllm_backend.front.answers import EventStream, until_hang_up
from lightllm_backend.front.chat.deltas import Delta, DeltaParser
from lightllm_backend.front.chat.deltas import Message as Parsed
from lightllm_backend.front.chat.parsers import make_parser
from lightllm_backend.front.chat.tool_choice import ToolChoice, read_tool_choice
from lightllm_backend.front.errors import ERROR_RESPONSES, ApiError, from_engine, refusal
from lightllm_backend.front.openai.events import Events, choice_json, text_json
from lightllm_backend.front.openai.generate import Job, Usage
from lightllm_backend.front.openai.logprobs import chat_logprobs
from lightllm_backend.front.openai.models import check_model
from lightllm_backend.front.openai.sampling import constraining_field, engine_options, seeds
from lightllm_backend.front.openai.schema import ChatCompletionRequest, Message, NamedTool
from lightllm_backend.front.state import Front, front_of, tenant_of
from lightllm_backend.request import AS_MANY_AS_FIT
from lightllm_backend.structured_output import text_of
from lightllm_client import Chunk, Generation, InvalidArgument
from lightllm_client.chat import ChatTemplateError

router = APIRouter(prefix="/v1", tags=["OpenAI"])

LONG_BODY = 1 << 15  # bytes; a template takes less than a millisecond for fewer

# Names that `ChatTemplate.render` and the templates' own variables have taken.
_TAKEN = {
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
    "self",
}

_DEVELOPER = re.compile(r"""["']developer["']""")  # the role, in a template


@router.post("/chat/completions", response_model=None, responses=ERROR_RESPONSES)
async def create_chat_completion(request: Request, body: ChatCompletionRequest) -> Response:
    """Answer a conversation."""
    front = front_of(request)
    check_model(front, body.model)
    choice = _tool_choice(front, body)
    options = _options(front, body, tenant_of(request), choice)
    prompt = await _rendered(request, front, body, choice)
    constrained_by = "tools" if choice.schema is not None else constraining_field(body)
    job = Job(front, [prompt], options, seeds(body, body.n or 1), "chatcmpl", constrained_by, "messages")

    def parser() -> DeltaParser:
        return make_parser(
            _template_text(front),
            prompt,
            choice,
            front.config.tool_call_parser,
            front.config.reasoning_parser,
            is_constrained="structured_output" in options,
        )

    if body.stream:
        return EventStream(_events(job, body, parser))
    try:
        answers = await until_hang_up(request, job.whole())
    except InvalidArgument as error:
        raise _refusal_of_messages(error) from None
    return JSONResponse(_answer(job, body, answers, parser))


def _tool_choice(front: Front, body: ChatCompletionRequest) -> ToolChoice:
    """Read what the model may call, and must."""
    choice = read_tool_choice(
        None if body.tools is None else [tool.model_dump(exclude_none=True) for tool in body.tools],
        body.tool_choice.model_dump() if isinstance(body.tool_choice, NamedTool) else body.tool_choice,
        several=body.parallel_tool_calls is not False,
    )
    if choice.tools is not None and choice.schema is None and "tools" not in _template_text(front):
        names = ", ".join(sorted(choice.names))
        raise refusal("tools", names, "none, since the model's chat template has no place for tools")
    return choice


def _template_text(front: Front) -> str:
    return "\n".join(front.chat_template.sources.values()) if front.chat_template is not None else ""


async def _rendered(request: Request, front: Front, body: ChatCompletionRequest, choice: ToolChoice) -> str:
    """Return the prompt of a conversation. A long one takes another thread its time, so that other requests go on."""
    if len(await request.body()) < LONG_BODY:
        return render(front, body, choice)
    return await asyncio.to_thread(render, front, body, choice)


def render(front: Front, body: ChatCompletionRequest, choice: ToolChoice) -> str:
    """Return the prompt of a conversation; raise ApiError 400 if the model's template refuses it."""
    if front.chat_template is None:
        allowed = "/v1/completions, since the model has no chat template"
        raise ApiError(400, f"messages are given; allowed: {allowed} ({front.no_chat_template})", "messages")
    names = front.chat_template.sources
    if body.chat_template is not None and body.chat_template not in names:
        raise refusal("chat_template", body.chat_template, f"the name of one of the model's: {', '.join(names)}")
    if body.add_generation_prompt and body.continue_final_message:
        raise refusal("continue_final_message", True, "false beside add_generation_prompt")
    variables = dict(body.chat_template_kwargs or {})
    if taken := _TAKEN & variables.keys():
        raise refusal("chat_template_kwargs", sorted(taken)[0], "variables of the template, without the others' names")
    for name in ("reasoning_effort", "verbosity"):
        if (value := getattr(body, name)) is not None:
            variables.setdefault(name, value)
    knows_developer = _DEVELOPER.search(_template_text(front)) is not None
    try:
        return front.chat_template.render(
            [_plain(message, knows_developer) for message in body.messages],
            body.add_generation_prompt,
            tools=choice.tools,
            documents=body.documents,
            continue_final_message=bool(body.continue_final_message),
            chat_template=body.chat_template,
            **variables,
        )
    except ChatTemplateError as error:
        allowed = "messages that the model's chat template takes"
        raise ApiError(400, f"messages cannot become a prompt: {error}; allowed: {allowed}", "messages") from None


def _plain(message: Message, knows_developer: bool) -> dict[str, Any]:
    """Return a message as templates know it: its content is text, and the arguments of calls are objects.

    knows_developer: the template mentions that role, which is OpenAI's newer name of system. Other templates would
    refuse such a message or, like Qwen's, leave it out.
    """
    plain = message.model_dump(exclude_none=True)
    if message.role == "developer" and not knows_developer:
        plain["role"] = "system"
    plain.setdefault("content", "")  # of a message that only calls tools; many templates join it to other text
    if isinstance(message.content, list):
        plain["content"] = "\n".join(part.text or part.refusal or "" for part in message.content)
    for call in plain.get("tool_calls", ()):
        function = call["function"]
        function["arguments"] = _arguments(function.get("arguments") or {})
    return plain


def _arguments(given: str | dict[str, Any]) -> str | dict[str, Any]:
    """Return the arguments of a call, an object or its text, as an object.

    A text that is no JSON object stays as it is: agents send back whatever a model has written, with the tool's
    complaint about it in the next message.
    """
    if isinstance(given, dict):
        return given
    try:
        arguments = json.loads(given)
    except (ValueError, RecursionError):
        return given
    return arguments if isinstance(arguments, dict) else given


def _options(front: Front, body: ChatCompletionRequest, tenant: str, choice: ToolChoice) -> dict[str, Any]:
    given = [number for number in (body.max_completion_tokens, body.max_tokens) if number is not None]
    options = engine_options(body, given[0] if given else AS_MANY_AS_FIT, tenant, front.defaults)
    if body.top_logprobs and not body.logprobs:
        raise refusal("top_logprobs", body.top_logprobs, "0, unless logprobs is true")
    if body.logprobs:
        options["return_log_probs"] = True
        if body.top_logprobs:
            options["top_logprobs"] = body.top_logprobs
    if choice.schema is not None:
        if "structured_output" in options:
            raise refusal("tool_choice", "required", "none or auto beside a field that constrains the answer")
        try:
            options["structured_output"] = text_of("json_schema", choice.schema)
        except ValueError as error:
            reason = f", {error}" if isinstance(error, NotExact) else ""
            allowed = "functions with JSON schemas for parameters"
            raise refusal("tools", sorted(choice.names), allowed, reason) from None
    return options


def _logprobs(job: Job, body: ChatCompletionRequest, part: Chunk | Generation) -> dict[str, Any] | None:
    if not body.logprobs:
        return None
    return chat_logprobs(job.front.token_texts, part.token_ids, part.log_probs, part.top_log_probs)


def _finish_reason(reason: str, has_calls: bool) -> str:
    return "tool_calls" if has_calls and reason == "stop" else reason


def _answer(
    job: Job, body: ChatCompletionRequest, answers: list[Generation], make: Callable[[], DeltaParser]
) -> dict[str, Any]:
    usage = Usage(len(job.seeds))
    choices = []
    for index, answer in enumerate(answers):
        usage.add(index, answer)
        parser = make()
        message = Parsed.join(_shown(body, parser.feed(answer.text) + parser.finish()))
        choices.append(
            {
                "index": index,
                "message": message.to_plain(),
                "logprobs": _logprobs(job, body, answer),
                "finish_reason": _finish_reason(answer.finish_reason, message.tool_calls is not None),
            }
        )
    return {
        "id": job.id,
        "object": "chat.completion",
        "created": job.created,
        "model": job.front.model_name,
        "choices": choices,
        "usage": usage.as_json(),
    }


def _refusal_of_messages(error: InvalidArgument) -> ApiError:
    """The error of a request that the engine has refused; what is wrong with its prompt is so with its messages."""
    refused = from_engine(error)
    if refused.param == "prompt":
        refused.param = "messages"
    return refused


def _shown(body: ChatCompletionRequest, deltas: list[Delta]) -> list[Delta]:
    if body.include_reasoning is False:
        return [delta for delta in deltas if not delta.reasoning_content]
    return deltas


async def _events(
    job: Job, body: ChatCompletionRequest, make: Callable[[], DeltaParser]
) -> AsyncGenerator[bytes, None]:
    usage = Usage(len(job.seeds))
    events = Events(job, "chat.completion.chunk", body, usage)
    parsers: dict[int, DeltaParser] = {}
    callers: set[int] = set()  # the answers that call tools
    try:
        async for index, chunk in job.chunks():
            usage.add(index, chunk)
            # What one chunk of the engine gives is sent together: the role at first, the text, the end at last.
            parts = []
            if index not in parsers:
                parsers[index] = make()
                parts.append(choice_json(index, '"delta": {"role": "assistant", "content": ""}', "", None))
            deltas = parsers[index].feed(chunk.text)
            if chunk.finish_reason:
                deltas += parsers[index].finish()
            logprobs = _logprobs(job, body, chunk) if chunk.token_ids else None
            contents = [_delta_json(delta) for delta in _shown(body, deltas)]
            if not contents and logprobs is not None:  # of text that is held back
                contents = ['"delta": {}']
            for content in contents:
                parts.append(choice_json(index, content, "", logprobs))
                logprobs = None
            if any(delta.tool_call is not None for delta in deltas):
                callers.add(index)
            if chunk.finish_reason:
                reason = _finish_reason(chunk.finish_reason, index in callers)
                parts.append(choice_json(index, '"delta": {}', reason, None))
            if parts:
                yield "".join(map(events.event, parts)).encode()
    except InvalidArgument as error:
        raise _refusal_of_messages(error) from None
    yield events.last()


def _delta_json(delta: Delta) -> str:
    if delta.content:
        return f'"delta": {{"content": {text_json(delta.content)}}}'
    return f'"delta": {json.dumps(delta.to_plain(), ensure_ascii=False)}'
