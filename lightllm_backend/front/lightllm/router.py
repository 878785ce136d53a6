# SPDX-License-Identifier: Apache-2.0
"""The routes of LightLLM's API: /generate, /generate_stream, /health, /healthz, /token_load and /tokens.

Errors have LightLLM's form, `{"message": …}`, and what the request has wrong its status 417. Of what LightLLM has no
answer for, a full queue or a server that has no engine, the status is that of the rest of the front.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Coroutine
from http import HTTPStatus
from typing import Any, cast

from fastapi import APIRouter, Request
from fastapi.routing import APIRoute
from starlette.responses import JSONResponse, Response

from lightllm_backend.client_json import NotExact, parse_json
from lightllm_backend.front.answers import CLIENT_GONE, ClientGone, EventStream, read_body, until_hang_up
from lightllm_backend.front.errors import ERROR_RESPONSES, ApiError, from_engine
from lightllm_backend.front.lightllm.answers import TokenEntries, body_of, event, to_event, to_json
from lightllm_backend.front.lightllm.parameters import (
    GenerateRequest,
    read_boolean,
    read_generate_request,
    refusal,
)
from lightllm_backend.front.state import Front, front_of, tenant_of
from lightllm_backend.options import check_prompt_bytes, show
from lightllm_backend.request import RequestError
from lightllm_backend.text.tokenizer_settings import TokenizerError
from lightllm_client import AsyncChunkStream, Chunk, Generation, LightLLMError
from lightllm_client.options import Options


class _Route(APIRoute):
    """A route whose errors are LightLLM's."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                return await handler(request)
            except (ApiError, LightLLMError, RequestError, TokenizerError) as error:
                failed = _api_error(error, getattr(request.state, "constrained_by", ""))
                # ASCII, since the message may repeat a lone surrogate.
                body = json.dumps({"message": failed.message})
                return Response(body, failed.status, failed.headers, "application/json")
            except ClientGone:
                return Response(status_code=CLIENT_GONE)

        return handle


def _api_error(error: Exception, constrained_by: str) -> ApiError:
    """constrained_by: see GenerateRequest."""
    if isinstance(error, LightLLMError):
        error = from_engine(error, constrained_by)
        error.message = error.message.replace(" and max_tokens is ", " and max_new_tokens is ", 1)
    if not isinstance(error, ApiError):  # the prompt or a parameter is wrong
        return ApiError(HTTPStatus.EXPECTATION_FAILED, error.message if isinstance(error, RequestError) else str(error))
    if error.status == HTTPStatus.BAD_REQUEST:
        error.status = HTTPStatus.EXPECTATION_FAILED
    return error


router = APIRouter(route_class=_Route, tags=["LightLLM"])


def _errors(*statuses: HTTPStatus) -> dict[int | str, dict[str, Any]]:
    """Describe the errors of a route. The last ones are of the front itself, before any route."""
    schema = {"type": "object", "properties": {"message": {"type": "string"}}, "required": ["message"]}
    own = {"content": {"application/json": {"schema": schema}}}
    return {
        **{int(status): {"description": status.phrase, **own} for status in statuses},
        **{status: ERROR_RESPONSES[status] for status in (401, 413, 500)},
    }


def _body_of(**properties: Any) -> dict[str, Any]:
    """Describe a JSON body, which the handlers read themselves: LightLLM's clients need not name its content type."""
    schema = {"type": "object", "properties": properties, "required": list(properties)[:1]}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


_GENERATE_BODY = _body_of(
    inputs={"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "integer"}}]},
    parameters={"type": "object"},
    multimodal_params={"type": "object"},
)
_GENERATE_ERRORS = _errors(
    HTTPStatus.EXPECTATION_FAILED,
    HTTPStatus.TOO_MANY_REQUESTS,
    HTTPStatus.SERVICE_UNAVAILABLE,
    HTTPStatus.GATEWAY_TIMEOUT,
)


@router.post("/generate", openapi_extra=_GENERATE_BODY, responses=_GENERATE_ERRORS)
async def generate(request: Request) -> Response:
    """Answer a prompt."""
    front = front_of(request)
    asked = await _asked(request, front)
    return await until_hang_up(request, _generate(front, asked))


@router.post("/generate_stream", openapi_extra=_GENERATE_BODY, responses=_GENERATE_ERRORS)
async def generate_stream(request: Request) -> Response:
    """Answer a prompt with an event for each token."""
    front = front_of(request)
    asked = await _asked(request, front)
    if asked.n != 1:
        raise refusal(f"n is {asked.n}; allowed: 1 (a stream has one answer)")
    options = cast(Options, {**asked.options, "return_log_probs": True})
    stream = front.client.stream(await _prompt(front, asked), **options)
    first = await anext(stream)  # an error before it is the whole answer
    return EventStream(_events(_entries_of(front, asked), first, stream))


@router.head("/health", include_in_schema=False)
@router.get("/health", responses=_errors(HTTPStatus.SERVICE_UNAVAILABLE))
@router.get("/healthz", responses=_errors(HTTPStatus.SERVICE_UNAVAILABLE))
async def health(request: Request) -> Response:
    """Say whether the server works."""
    try:
        await front_of(request).client.health()
    except LightLLMError:
        return JSONResponse({"message": "Error"}, HTTPStatus.SERVICE_UNAVAILABLE)
    return JSONResponse({"message": "Ok"})


@router.get("/token_load", responses=_errors(HTTPStatus.SERVICE_UNAVAILABLE))
async def token_load(request: Request) -> Response:
    """Say how full the KV pool is, from 0 to 1."""
    load = await front_of(request).engine_load.read()
    used, total = load["kv_tokens_used"], load["kv_tokens_total"]
    if used is None or not total:
        raise ApiError(HTTPStatus.SERVICE_UNAVAILABLE, "the engine does not tell its load")
    # LightLLM estimates the load to come as well; this engine admits a request only if it fits to its end.
    return JSONResponse(dict.fromkeys(("current_load", "logical_max_load", "dynamic_max_load"), used / total))


@router.get("/tokens", include_in_schema=False)
@router.post(
    "/tokens",
    openapi_extra=_body_of(text={"type": "string"}, parameters={"type": "object"}),
    responses=_errors(HTTPStatus.EXPECTATION_FAILED),
)
async def tokens(request: Request) -> Response:
    """Count the tokens of a text."""
    body = await _json_body(request)
    for name in body:
        if name not in ("text", "parameters", "multimodal_params"):
            raise refusal(f"{show(name)} is not a field; allowed: text, parameters")
    text, parameters = body.get("text"), body.get("parameters") or {}
    if not isinstance(text, str):
        raise refusal(f"text is {show(text)}; allowed: a string")
    if not isinstance(parameters, dict) or not parameters.keys() <= {"add_special_tokens"}:
        raise refusal(f"parameters is {show(parameters)}; allowed: an object with add_special_tokens, or empty")
    add_special_tokens = read_boolean(parameters, "add_special_tokens", True)
    return JSONResponse({"ntokens": len(await _encode(front_of(request), "text", text, add_special_tokens))})


async def _asked(request: Request, front: Front) -> GenerateRequest:
    asked = read_generate_request(await _json_body(request), tenant_of(request), front.defaults)
    request.state.constrained_by = asked.constrained_by
    return asked


async def _json_body(request: Request) -> dict[str, Any]:
    try:
        body = parse_json((await read_body(request)).decode())
    except NotExact as error:
        raise refusal(f"the body is JSON {error}; allowed: a JSON object") from None
    except UnicodeDecodeError:
        raise refusal("the body is not UTF-8; allowed: a JSON object") from None
    except ValueError as error:
        raise refusal(f"the body is not JSON ({error}); allowed: a JSON object") from None
    if not isinstance(body, dict):
        raise refusal(f"the body is {show(body)}; allowed: a JSON object")
    return body


async def _encode(front: Front, name: str, text: str, add_special_tokens: bool) -> list[int]:
    """Return the ids of a text; raise RequestError, by the name of its field, if it has none."""
    try:
        check_prompt_bytes(len(text.encode(errors="replace")), front.config.max_prompt_bytes)
        return await front.encode(text, add_special_tokens)
    except RequestError as error:
        raise refusal(error.message.replace("text_input", name, 1)) from None
    except TokenizerError as error:
        raise refusal(f"{name}: {error}") from None


async def _prompt(front: Front, asked: GenerateRequest) -> str | tuple[int, ...]:
    """Return the prompt for the engine, which puts special tokens around every text."""
    if isinstance(asked.prompt, str) and not asked.add_special_tokens:
        return tuple(await _encode(front, "inputs", asked.prompt, add_special_tokens=False))
    return asked.prompt


async def _generate(front: Front, asked: GenerateRequest) -> Response:
    prompt = await _prompt(front, asked)
    # Only chunks tell which text belongs to which token.
    if not asked.return_details:
        answers = await _answers(front, asked, prompt)
        return Response(to_json(body_of(answers, [])), media_type="application/json")
    makers = [_entries_of(front, asked) for _ in range(asked.n)]
    entries: list[list[dict[str, Any]]] = [[] for _ in range(asked.n)]
    async with front.client.stream(prompt, **asked.options) as stream:
        chunks = [chunk async for chunk in stream]
    for chunk in chunks:
        entries[chunk.index] += makers[chunk.index].take(chunk)
    return Response(to_json(body_of(Generation.join_several(chunks), entries)), media_type="application/json")


async def _answers(front: Front, asked: GenerateRequest, prompt: str | tuple[int, ...]) -> list[Generation]:
    if asked.n > 1:
        return await front.client.generate_several(prompt, **asked.options)
    return [await front.client.generate(prompt, **asked.options)]


def _entries_of(front: Front, asked: GenerateRequest) -> TokenEntries:
    return TokenEntries(front.tokenizer, asked.options.get("skip_special_tokens", True))


async def _events(maker: TokenEntries, first: Chunk, stream: AsyncChunkStream) -> AsyncGenerator[bytes, None]:
    async with stream:
        try:
            chunk: Chunk | None = first
            while chunk is not None:
                entries = maker.take(chunk)
                for entry in entries:
                    is_last = entry is entries[-1]
                    yield event(entry, chunk.finish_reason if is_last and chunk.finish_reason else None)
                chunk = await anext(stream, None)
        except LightLLMError as error:
            yield to_event({"message": from_engine(error).message})
