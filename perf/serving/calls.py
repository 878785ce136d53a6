# SPDX-License-Identifier: Apache-2.0
"""How a request is asked over gRPC, HTTP or OpenAI's API, in asyncio: what is sent is made before the clock starts."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import grpc  # type: ignore[import-untyped]
from tritonclient.grpc import service_pb2_grpc

from lightllm_client.errors import error_from_message
from lightllm_client.tensors import Chunk, chunk_from_response, infer_request
from perf.serving.http_connection import HttpConnection
from perf.serving.measure import RequestFailed
from perf.serving.workload import WorkItem

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class Target:
    """Where requests go, and what all of them say."""

    protocol: str  # "grpc", "http" or "openai"
    address: str  # host:port
    streaming: bool = True
    ignore_eos: bool = True
    timeout: float = 600.0
    model: str = "lightllm"


class Part(NamedTuple):
    """What is measured of one response of an answer."""

    num_input_tokens: int
    num_output_tokens: int  # in this response
    finish_reason: str  # "" until the last one


class Caller(Protocol):
    """A connection; `payload` is the message of a request, `ask` sends it and gives the parts of its answer."""

    def payload(self, item: WorkItem) -> Any: ...
    def ask(self, payload: Any) -> AsyncIterator[Part]: ...
    async def __aenter__(self) -> Self: ...
    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


def caller_for(target: Target) -> Caller:
    callers: dict[str, type[GrpcCaller | HttpCaller]] = {"grpc": GrpcCaller, "http": HttpCaller, "openai": OpenAICaller}
    return callers[target.protocol](target)


def part_of(chunk: Chunk) -> Part:
    """RequestFailed if the ensemble has counted other tokens than it sent."""
    if len(chunk.token_ids) != chunk.num_output_tokens:
        raise RequestFailed(f"num_output_tokens is {chunk.num_output_tokens}, but {len(chunk.token_ids)} ids came")
    return Part(chunk.num_input_tokens, chunk.num_output_tokens, chunk.finish_reason)


class GrpcCaller:
    """Streams on one channel, through tritonclient's stub. Each carries a request at a time and is kept for the next,
    as tritonclient and perf_analyzer keep theirs, and HTTP clients their connections."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._idle: list[Any] = []  # streams without a request

    async def __aenter__(self) -> Self:
        options = [("grpc.max_receive_message_length", -1), ("grpc.enable_http_proxy", 0)]
        self._channel = grpc.aio.insecure_channel(self._target.address, options=options)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for stream in self._idle:
            await stream.done_writing()
            await stream.read()  # its end
        await self._channel.close()

    def payload(self, item: WorkItem) -> Any:
        target = self._target
        options: Any = {"max_tokens": item.length.output, "ignore_eos": target.ignore_eos}
        return infer_request(target.model, item.prompt, target.streaming, options)

    async def ask(self, payload: Any) -> AsyncIterator[Part]:
        stream = self._idle.pop() if self._idle else self._stub.ModelStreamInfer()
        timer = asyncio.get_running_loop().call_later(self._target.timeout, stream.cancel)
        try:
            await stream.write(payload)
            is_over = False
            while not is_over and (response := await stream.read()) is not grpc.aio.EOF:
                if response.error_message:
                    raise error_from_message(response.error_message)
                if response.infer_response.outputs:
                    yield part_of(chunk_from_response(response.infer_response))
                is_over = response.infer_response.parameters["triton_final_response"].bool_param
        except grpc.aio.AioRpcError as error:
            raise RequestFailed(f"{error.code().name}: {error.details()}") from None
        except asyncio.CancelledError:
            if stream.cancelled():
                raise RequestFailed(f"no answer within {self._target.timeout:g} s") from None
            raise
        finally:
            timer.cancel()
        if is_over:
            self._idle.append(stream)


class HttpCaller:
    """Triton server's generate endpoints."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._path = self.path()

    def path(self) -> str:
        endpoint = "generate_stream" if self._target.streaming else "generate"
        return f"/v2/models/{self._target.model}/{endpoint}"

    async def __aenter__(self) -> Self:
        self._idle: list[HttpConnection] = []  # connections without a request
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for connection in self._idle:
            connection.close()

    def payload(self, item: WorkItem) -> bytes:
        text = isinstance(item.prompt, str)
        body = {
            "text_input" if text else "input_ids": item.prompt,
            "max_tokens": item.length.output,
            "ignore_eos": self._target.ignore_eos,
            "stream": self._target.streaming,
        }
        return json.dumps(body).encode()

    async def ask(self, payload: bytes) -> AsyncIterator[Part]:
        connection = await self._connection()
        try:
            status = await connection.post(self._path, payload, self._target.timeout)
            if status == 200 and self._target.streaming:
                async for part in self.parts(events_of(connection.pieces())):
                    yield part
                return
            body = b"".join([piece async for piece in connection.pieces()])
            if status != 200:
                raise RequestFailed(f"status {status}: {body.decode(errors='replace')}")
            yield self.whole(body)
        except OSError as error:
            raise RequestFailed(str(error)) from None
        finally:
            if connection.may_be_used:
                self._idle.append(connection)
            else:
                connection.close()

    async def _connection(self) -> HttpConnection:
        while self._idle:
            connection = self._idle.pop()
            if connection.may_be_used:  # the server has not closed it
                return connection
        try:
            return await HttpConnection.open(self._target.address)
        except OSError as error:
            raise RequestFailed(str(error)) from None

    def whole(self, body: bytes) -> Part:
        return part_of(chunk_from_json(body))

    async def parts(self, events: AsyncIterator[bytes]) -> AsyncIterator[Part]:
        async for event in events:
            yield part_of(chunk_from_json(event))


class OpenAICaller(HttpCaller):
    """/v1/completions of the front, or of any server that tells the usage in every event of a stream."""

    def path(self) -> str:
        return "/v1/completions"

    def payload(self, item: WorkItem) -> bytes:
        body: dict[str, Any] = {
            "prompt": item.prompt,
            "max_tokens": item.length.output,
            "ignore_eos": self._target.ignore_eos,
            "temperature": 0,
            "stream": self._target.streaming,
        }
        if self._target.streaming:
            body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
        return json.dumps(body).encode()

    def whole(self, body: bytes) -> Part:
        answer = _openai_answer(body)
        usage = answer["usage"]
        return Part(usage["prompt_tokens"], usage["completion_tokens"], answer["choices"][0]["finish_reason"])

    async def parts(self, events: AsyncIterator[bytes]) -> AsyncIterator[Part]:
        told = 0  # tokens
        is_over = False
        async for event in events:
            if event == b"[DONE]":
                is_over = True
                continue
            answer = _openai_answer(event)
            usage = answer.get("usage")
            if usage is None:
                raise RequestFailed("an event tells no usage; needed: a server that knows continuous_usage_stats")
            new, told = usage["completion_tokens"] - told, usage["completion_tokens"]
            if answer["choices"]:
                yield Part(usage["prompt_tokens"], new, answer["choices"][0]["finish_reason"] or "")
            elif new:
                raise RequestFailed(f"the last event tells {new} tokens more than those before")
        if not is_over:
            raise RequestFailed("the stream ended without [DONE]")


async def events_of(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The data of server-sent events of one line each."""
    rest = b""
    async for piece in pieces:
        *events, rest = (rest + piece).split(b"\n\n")
        for event in events:
            yield event.removeprefix(b"data: ").strip()


def _openai_answer(text: bytes) -> dict[str, Any]:
    answer = _json(text)
    if "error" in answer:
        raise RequestFailed(str(answer["error"]["message"]))
    return answer


def _json(text: bytes) -> dict[str, Any]:
    try:
        answer: dict[str, Any] = json.loads(text)
    except ValueError:
        raise RequestFailed(f"the server answered {text[:200]!r}, which is no JSON") from None
    return answer


def chunk_from_json(text: bytes) -> Chunk:
    answer = _json(text)
    if "error" in answer:
        raise error_from_message(answer["error"])
    return Chunk(
        text=answer["text_output"],
        token_ids=_list_of(answer["output_ids"]),
        log_probs=_list_of(answer["output_log_probs"]),
        cumulative_logprob=answer["cumulative_logprob"],
        finish_reason=answer["finish_reason"],
        num_input_tokens=answer["num_input_tokens"],
        num_output_tokens=answer["num_output_tokens"],
    )


def _list_of(value: Any) -> tuple[Any, ...]:
    """The server writes a tensor of one element as that element."""
    return tuple(value) if isinstance(value, list) else (value,)
