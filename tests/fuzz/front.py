# SPDX-License-Identifier: Apache-2.0
"""The front in this process, with an engine that refuses what the real one does, and calls of it without a network."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from lightllm_backend.config import EngineConfig
from lightllm_backend.front.application import make_application
from lightllm_backend.front.state import Front
from lightllm_backend.lengths import LengthLimits
from lightllm_backend.options import (
    check_lengths,
    check_prompt_logprobs,
    check_token_ids,
    fitted,
    parse_request,
)
from lightllm_backend.request import Request, RequestError
from lightllm_backend.text.prompt import check_prompt, encode_prompt
from lightllm_backend.text.tokenizer import Tokenizer
from lightllm_backend.triton_server.tensors import PUBLIC_INPUTS
from lightllm_client import Chunk, Generation, InvalidArgument
from lightllm_client.chat import ChatTemplate
from lightllm_client.errors import error_from_message
from lightllm_client.tensors import PromptLogProbs, infer_request
from tests.client.conftest import decode_inputs
from tests.front.lightllm.engine import Load
from tests.front.pretended import TEMPLATE
from tests.fuzz.http_calls import API_KEY, Answer, HttpCall, check_answer, variants

DATA = Path(__file__).parents[1] / "data"
HANGING_SECONDS = 60.0
CALLS_EACH = 5  # a call and its variants
MAX_BODY_BYTES = 20_000
MODEL_LENGTH = 2048
# What the engine says, by the number of its prompt's tokens.
_SAYS = (
    ("Hel", "lo"),
    ("", "<tool_call>", '{"name": "f", "arguments": {"a": 1}}</tool_', "call>"),
    ('{"name": "f", "parameters": {"a": "\u2028', '😀"}}'),
    ("<think>\n", "so</thi", "nk>é", "\n\n"),
    ("<|python_tag|>[", '{"name": 1}, "'),
)


class StrictStream(AsyncIterator[Chunk]):
    """The chunks of one request; a request that the server would refuse fails at the first one."""

    def __init__(self, engine: StrictEngine, message: Any) -> None:
        self._engine = engine
        self._chunks = self._answer(message)
        engine.num_open += 1
        self._is_open = True

    def _close(self) -> None:
        self._engine.num_open -= self._is_open
        self._is_open = False

    async def __anext__(self) -> Chunk:
        await asyncio.sleep(0)
        try:
            return next(self._chunks)
        except StopIteration:
            self._close()
            raise StopAsyncIteration from None
        except RequestError as error:
            self._close()
            raise error_from_message(str(error)) from None

    async def aclose(self) -> None:
        self._close()

    async def __aenter__(self) -> StrictStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._close()

    def _answer(self, message: Any) -> Any:
        values = {
            name: items if PUBLIC_INPUTS[name][1] == -1 else items[0]
            for name, (_, _, items) in decode_inputs(message).items()
        }
        request = self._engine.checked(values)
        sampling, num_input = request.sampling, len(request.prompt_ids)
        says = _SAYS[num_input % len(_SAYS)] if sampling.max_tokens > 1 else ("Ho",)
        top = dict(zip(range(65, 65 + sampling.top_logprobs), (-0.5, *[float("-inf")] * 20), strict=False))
        for index in range(sampling.n):
            for number, text in enumerate(says):
                tokens = (65 + number,) if sampling.max_tokens else ()
                yield Chunk(
                    text if tokens else "", tokens, (-0.25,) * len(tokens) if sampling.return_log_probs else (), 0.0,
                    "stop" if number == len(says) - 1 else "", num_input, len(tokens), index=index,
                    prompt_log_probs=_scores(num_input, sampling.prompt_logprobs) if number == index == 0 else None,
                    top_log_probs=(top,) * len(tokens) if top else (),
                )  # fmt: skip


def _scores(num_input: int, count: int) -> PromptLogProbs | None:
    if count < 0 or num_input == 1:
        return None
    likeliest = tuple((66 + rank, -1.0 - rank) for rank in range(count))
    return PromptLogProbs((float("-inf"),) * (num_input - 1), (likeliest,) * (num_input - 1))


class StrictEngine:
    """Stands for AsyncLightLLMClient and the server behind it: the same checks, in the same order."""

    def __init__(self, config: EngineConfig, tokenizer: Tokenizer, lengths: LengthLimits) -> None:
        self._config, self._tokenizer, self._lengths = config, tokenizer, lengths
        self.num_open = 0  # streams that nobody has closed

    def checked(self, values: dict[str, Any]) -> Request:
        """The request that a message becomes; raise RequestError as the tokenizer step and the engine would."""
        parsed = parse_request(values)
        check_prompt(parsed, self._tokenizer, self._config.max_prompt_bytes, self._lengths)
        prompt = encode_prompt(parsed, self._tokenizer, self._lengths)
        check_lengths(len(prompt.token_ids), parsed.options.sampling.max_tokens, self._lengths)
        request = fitted(Request("", tuple(prompt.token_ids), parsed.options.sampling), self._lengths)
        sampling, vocab_size = request.sampling, self._tokenizer.vocab_size
        check_token_ids("input_ids", request.prompt_ids, vocab_size)
        check_token_ids("stop_token_ids (or end_id)", sampling.stop_token_ids, vocab_size)
        check_token_ids("logit_bias", tuple(token_id for token_id, _ in sampling.logit_bias), vocab_size)
        if sampling.prompt_logprobs >= 0:
            check_prompt_logprobs(len(request.prompt_ids), sampling.prompt_logprobs, vocab_size)
        return request

    def stream(self, prompt: Any, **options: Any) -> StrictStream:
        return StrictStream(self, infer_request("lightllm", prompt, True, options))

    async def generate(self, prompt: Any, **options: Any) -> Generation:
        if options.get("n", 1) != 1:
            raise InvalidArgument(f"n is {options['n']!r}; allowed: 1, or generate_several")
        async with self.stream(prompt, **options) as stream:
            return Generation.join([chunk async for chunk in stream])

    async def generate_several(self, prompt: Any, **options: Any) -> list[Generation]:
        async with self.stream(prompt, **options) as stream:
            return Generation.join_several([chunk async for chunk in stream])

    async def health(self) -> float:
        return 0.0


class FrontInProcess:
    """The application, and a loop that calls it."""

    def __init__(self) -> None:
        config = EngineConfig(max_body_bytes=MAX_BODY_BYTES, max_prompt_bytes=MAX_BODY_BYTES // 2)
        tokenizer, lengths = Tokenizer.load(DATA / "byte_level"), LengthLimits.of(config, MODEL_LENGTH)
        self._engine = StrictEngine(config, tokenizer, lengths)
        template = ChatTemplate(TEMPLATE + "<tool_call></think>", {})
        front = Front(config, "tiny", self._engine, tokenizer, lengths, template)  # type: ignore[arg-type]
        object.__setattr__(front, "engine_load", Load(1, 2))
        self._application = make_application(front, [API_KEY])
        self.document: dict[str, Any] = self._application.openapi()
        self._loop = asyncio.new_event_loop()
        self._neighbours = self._loop.run_until_complete(self._call(_NEIGHBOUR))

    def check(self, call: HttpCall) -> None:
        """Make the call and its variants at once, beside another one, whose answer must not change.

        Nothing of them may be left.
        """
        self._loop.run_until_complete(asyncio.wait_for(self._check(call), HANGING_SECONDS))

    async def _check(self, call: HttpCall) -> None:
        others = asyncio.all_tasks()
        calls = (_NEIGHBOUR, call, *variants(call))
        answers = await asyncio.gather(*map(self._call, calls), return_exceptions=True)
        for one, answer in zip(calls, answers, strict=True):
            if isinstance(answer, BaseException):
                raise answer
            if answer is not None and one.hangs_up_after is None:
                check_answer(one, answer, self.document)
        neighbours = answers[0]
        assert (neighbours.status, _without_id(neighbours.body)) == (200, _without_id(self._neighbours.body))
        for _ in range(3):  # what was cancelled ends
            await asyncio.sleep(0)
        assert self._engine.num_open == 0
        assert asyncio.all_tasks() == others

    async def _call(self, call: HttpCall) -> Any:
        path, _, query = call.path.partition("?")
        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1",
            "method": call.method, "path": unquote(path), "raw_path": path.encode(), "query_string": query.encode(),
            "root_path": "", "scheme": "http", "client": None, "server": None,
            "headers": [(name.encode(), value.encode("latin-1")) for name, value in call.headers],
        }  # fmt: skip
        pieces = list(call.pieces)
        sent: list[Any] = []
        has_left = asyncio.Event()
        if call.hangs_up_after == 0:
            has_left.set()

        async def receive() -> dict[str, Any]:
            if pieces:
                piece = pieces.pop(0)
                return {"type": "http.request", "body": piece, "more_body": bool(pieces)}
            await has_left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            await asyncio.sleep(0)
            sent.append(message)
            if len(sent) == call.hangs_up_after:
                has_left.set()

        await self._application(scope, receive, send)
        if call.hangs_up_after is not None:
            return None
        start, *bodies = sent
        headers = {name.decode(): value.decode("latin-1") for name, value in start["headers"]}
        return Answer(start["status"], headers, b"".join(message.get("body", b"") for message in bodies))


_NEIGHBOUR = HttpCall(
    "POST",
    "/v1/completions",
    (("content-type", "application/json"), ("authorization", f"Bearer {API_KEY}")),
    (b'{"prompt": "neighbour", "max_tokens": 9, "logprobs": 2, "n": 2}',),
)


def check(call: HttpCall) -> None:
    """Make the call of a front that is made at the first one."""
    _the_front().check(call)


def document() -> dict[str, Any]:
    """The OpenAPI document of that front."""
    return _the_front().document


@functools.cache
def _the_front() -> FrontInProcess:
    return FrontInProcess()


def _without_id(body: bytes) -> bytes:
    return body.partition(b'"object"')[2].partition(b'"created"')[0] + body.partition(b'"model"')[2]
