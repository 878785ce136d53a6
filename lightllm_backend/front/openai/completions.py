# SPDX-License-Identifier: Apache-2.0
"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from lightllm_backend.front.answers import EventStream, until_hang_up
from lightllm_backend.front.errors import ERROR_RESPONSES
from lightllm_backend.front.openai.events import Events, choice_json, text_json
from lightllm_backend.front.openai.generate import Job, Prompt, Usage
from lightllm_backend.front.openai.logprobs import CompletionLogprobs, TopTokens
from lightllm_backend.front.openai.models import check_model
from lightllm_backend.front.openai.sampling import constraining_field, engine_options, seeds
from lightllm_backend.front.openai.schema import CompletionRequest
from lightllm_backend.front.state import Front, front_of, tenant_of
from lightllm_client import Chunk, Generation
from lightllm_client.tensors import PromptLogProbs

router = APIRouter(prefix="/v1", tags=["OpenAI"])


@router.post("/completions", response_model=None, responses=ERROR_RESPONSES)
async def create_completion(request: Request, body: CompletionRequest) -> Response:
    """Continue one or several prompts, each text or token ids."""
    front = front_of(request)
    check_model(front, body.model)
    options = _options(front, body, tenant_of(request))
    job = Job(front, _prompts(body), options, seeds(body, body.n or 1), "cmpl", constraining_field(body))
    if body.stream:
        return EventStream(_events(job, body))
    answers = await until_hang_up(request, job.whole())
    return JSONResponse(await _answer(job, body, answers))


def _prompts(body: CompletionRequest) -> list[Prompt]:
    prompt: Any = body.prompt
    is_one = isinstance(prompt, str) or isinstance(prompt[0], int)
    return [prompt] if is_one else prompt


def _options(front: Front, body: CompletionRequest, tenant: str) -> dict[str, Any]:
    # Without prompt_logprobs the engine makes at least one token; it is left out of the answer if none is wanted.
    max_tokens = 16 if body.max_tokens is None else body.max_tokens
    scores_prompt = bool(body.echo) and body.logprobs is not None
    least = 0 if scores_prompt else 1
    options = engine_options(body, max(least, max_tokens), tenant, front.defaults)
    if body.echo and max_tokens:
        options["exclude_input_in_output"] = False
    if body.logprobs is not None:
        options["return_log_probs"] = True
        if body.logprobs > 0:
            options["top_logprobs"] = body.logprobs
        if scores_prompt:
            options["prompt_logprobs"] = body.logprobs
    return options


def _echo(job: Job, index: int, body: CompletionRequest) -> str:
    """Return the text of an answer that is only to repeat its prompt, if it is."""
    prompt = job.prompt_of(index)
    if not body.echo:
        return ""
    if isinstance(prompt, str):
        return prompt
    return job.front.tokenizer.decode_prompt(prompt, body.skip_special_tokens is not False)


async def _logprobs(
    job: Job, index: int, body: CompletionRequest, record: CompletionLogprobs, part: Chunk | Generation
) -> dict[str, Any] | None:
    """Return the log probabilities of a part of an answer; its first part has those of an echoed prompt, too."""
    if body.logprobs is None:
        return None
    token_ids: Sequence[int] = part.token_ids
    log_probs: Sequence[float | None] = part.log_probs
    top: TopTokens = part.top_log_probs
    if body.echo and record.is_empty:
        prompt = job.prompt_of(index)
        prompt_ids = await job.front.encode(prompt) if isinstance(prompt, str) else prompt
        scores = part.prompt_log_probs or PromptLogProbs((), ())  # none if the prompt is one token
        token_ids = [*prompt_ids, *token_ids]
        log_probs = [None, *scores.log_probs, *log_probs]
        top = [{}, *map(dict, scores.top), *top]
    return record.of(token_ids, log_probs, top)


async def _answer(job: Job, body: CompletionRequest, answers: list[Generation]) -> dict[str, Any]:
    usage = Usage(len(job.seeds))
    choices = []
    for index, made in enumerate(answers):
        answer = made if body.max_tokens != 0 else _without_output(made, _echo(job, index, body))
        usage.add(index, answer)
        record = CompletionLogprobs(job.front.token_texts, body.logprobs or 0)
        logprobs = await _logprobs(job, index, body, record, answer)
        choices.append(
            {"index": index, "text": answer.text, "logprobs": logprobs, "finish_reason": answer.finish_reason}
        )
    return {
        "id": job.id,
        "object": "text_completion",
        "created": job.created,
        "model": job.front.model_name,
        "choices": choices,
        "usage": usage.as_json(),
    }


def _without_output(made: Generation, text: str) -> Generation:
    """Return the answer to a request for no tokens."""
    empty = replace(made, token_ids=(), log_probs=(), top_log_probs=(), cumulative_logprob=0.0, num_output_tokens=0)
    return replace(empty, text=text, finish_reason="length")


async def _events(job: Job, body: CompletionRequest) -> AsyncGenerator[bytes, None]:
    usage = Usage(len(job.seeds))
    events = Events(job, "text_completion", body, usage)
    records = [CompletionLogprobs(job.front.token_texts, body.logprobs or 0) for _ in range(job.number)]
    if body.max_tokens == 0:
        for index, made in enumerate(await job.whole()):
            answer = _without_output(made, _echo(job, index, body))
            usage.add(index, answer)
            logprobs = await _logprobs(job, index, body, records[index], answer)
            yield events.event(choice_json(index, f'"text": {text_json(answer.text)}', "length", logprobs)).encode()
    else:
        async for index, chunk in job.chunks():
            usage.add(index, chunk)
            logprobs = await _logprobs(job, index, body, records[index], chunk)
            content = f'"text": {text_json(chunk.text)}'
            yield events.event(choice_json(index, content, chunk.finish_reason, logprobs)).encode()
    yield events.last()
