# SPDX-License-Identifier: Apache-2.0
"""AsyncLightLLMClient: LightLLMClient for asyncio, with any number of requests at once on one connection."""

from __future__ import annotations

import asyncio
import contextlib
import time
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import grpc  # type: ignore[import-untyped]
from tritonclient.grpc import service_pb2_grpc

from lightllm_client.endpoint import HEALTH_SECONDS, Endpoint, StreamState
from lightllm_client.errors import Cancelled, LightLLMError
from lightllm_client.options import Options
from lightllm_client.retries import Retries
from lightllm_client.tensors import Chunk, Generation

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

_draining: set[asyncio.Task[None]] = set()  # the event loop itself keeps no task alive


class AsyncChunkStream(AsyncIterator[Chunk]):
    """The chunks of one request, as they are made.

    Ending early cancels the request on the server: `await aclose()` (from any task), leaving an `async with` block,
    cancelling the task that waits for a chunk, or dropping the last reference, as `break` in a loop over
    `client.stream(...)` does. A closed stream has no more chunks.
    """

    def __init__(
        self,
        call: Any,
        repeat: Callable[[float | None], Any],
        endpoint: Endpoint,
        timeout: float | None,
        options: Options,
        retries: Retries,
    ) -> None:
        """call: of the request; repeat: sends it again, with a timeout in seconds, and returns that call."""
        self._call = call
        self._loop = asyncio.get_running_loop()
        self._closing = asyncio.Event()  # interrupts the pause before a retry
        self._client_closed = False
        self._state = StreamState(options)
        self._repeat = repeat
        self._endpoint = endpoint
        self._timeout = timeout
        self._retries = retries

    async def __anext__(self) -> Chunk:
        while not self._state.closed:
            try:
                message = await self._next_message()
                if message is None:
                    break
                chunk = self._state.take(message)
            except LightLLMError as error:
                if await self._begins_again(error):
                    continue
                await self.aclose()
                raise
            if chunk is not None:
                self._retries.stop()
                return chunk
        raise StopAsyncIteration

    async def _begins_again(self, error: LightLLMError) -> bool:
        """Whether the request was sent again, after a pause, or the stream was closed meanwhile."""
        pause = self._retries.pause_after(error)
        if pause is None:
            return False
        if self._state.finished:
            await _drain(self._call)
        self._state.begin_again()
        try:
            await asyncio.wait_for(self._closing.wait(), pause)
        except asyncio.TimeoutError:
            pass
        except asyncio.CancelledError:
            self._state.closed = True
            raise
        if self._state.closed:
            return True
        if self._client_closed:
            self._state.closed = True
            raise Cancelled("the client was closed")
        self._call = self._repeat(self._retries.seconds_left())
        return True

    async def _next_message(self) -> Any | None:
        """The server's next message; None when the request is over or was closed here."""
        try:
            message = await self._call.read()
        except asyncio.CancelledError:  # of the call, or of the task that waits for it
            was_closed, self._state.closed = self._state.closed, True
            if _task_is_cancelled() or not (was_closed or self._client_closed):
                raise
            if was_closed:
                return None
            raise Cancelled("the client was closed") from None
        except grpc.RpcError as error:
            if self._state.closed:
                return None
            raise self._endpoint.error(error, self._timeout) from None
        if message is grpc.aio.EOF:
            if not self._state.closed:
                self._state.end()
            return None
        return message

    async def aclose(self) -> None:
        """Cancel the request unless it is over; a request that is over ends by itself, as in ChunkStream.close."""
        if self._state.finished and not self._state.closed:
            await _drain(self._call)
        self._state.closed = True
        self._closing.set()
        self._call.cancel()

    def abandon(self) -> None:
        """Cancel the request because its client is closed; whoever waits for a chunk gets the error Cancelled."""
        self._client_closed = True
        self._closing.set()
        self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        # The garbage collector runs in any thread. A loop that is closed has ended its calls.
        if not self._state.closed:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(_leave, self._call, self._state.finished)


def _task_is_cancelled() -> bool:
    """Whether the current task has been told to end; Python 3.10 does not say."""
    task = asyncio.current_task()
    cancelling = getattr(task, "cancelling", None)
    return cancelling is not None and cancelling() > 0


async def _drain(call: Any) -> None:
    """Wait for the server's end of a call."""
    with contextlib.suppress(grpc.RpcError):
        while await call.read() is not grpc.aio.EOF:
            pass


def _leave(call: Any, finished: bool) -> None:
    """End a call that nobody reads any more."""
    if not finished:
        call.cancel()
        return
    task = asyncio.ensure_future(_drain(call))
    _draining.add(task)
    task.add_done_callback(_draining.discard)


class AsyncLightLLMClient:
    """Calls the ensemble `model` of the Triton server whose gRPC port is at `url`, from one event loop.

    Any number of tasks may use it at once. It connects at its first call, so it may be made before the event loop runs.
    `timeout` is in seconds and covers a whole request, to its last token; each call may set its own. `max_retries` and
    `prefix_key` are LightLLMClient's. Errors are LightLLMError and its subclasses.
    """

    def __init__(
        self,
        url: str = Endpoint.url,
        model: str = Endpoint.model,
        timeout: float | None = Endpoint.timeout,
        max_retries: int = Endpoint.max_retries,
    ) -> None:
        self._endpoint = Endpoint(url, model, timeout, max_retries)
        self._channel: Any = None
        self._stub: Any = None
        self._streams: weakref.WeakSet[AsyncChunkStream] = weakref.WeakSet()

    async def generate(
        self,
        prompt: str | Sequence[int],
        *,
        timeout: float | None = None,
        prefix_key: str | None = None,
        **options: Unpack[Options],
    ) -> Generation:
        """The whole answer to a prompt, which is text or token ids; `Options` lists the options."""
        self._endpoint.check_one_answer(options)
        async with self._start(prompt, False, timeout, prefix_key, options) as chunks:
            return Generation.join([chunk async for chunk in chunks])

    async def generate_several(
        self,
        prompt: str | Sequence[int],
        *,
        timeout: float | None = None,
        prefix_key: str | None = None,
        **options: Unpack[Options],
    ) -> list[Generation]:
        """The whole answers to a prompt, as many as the option `n` says, in order of their seeds."""
        async with self._start(prompt, True, timeout, prefix_key, options) as chunks:
            return Generation.join_several([chunk async for chunk in chunks])

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        timeout: float | None = None,
        prefix_key: str | None = None,
        **options: Unpack[Options],
    ) -> AsyncChunkStream:
        """The answer to a prompt, chunk by chunk as it is made; the event loop sends the request when it next runs."""
        return self._start(prompt, True, timeout, prefix_key, options)

    async def health(self, timeout: float | None = HEALTH_SECONDS) -> float:
        """How many seconds the server took to say that it works; raises Unavailable, with the reason, if it does not.

        The answer does not wait behind other requests, so a busy server is healthy too.
        """
        started = time.monotonic()
        try:
            await self._connected().ModelInfer(self._endpoint.health_request(), timeout=timeout)
        except grpc.RpcError as error:
            raise self._endpoint.error(error, timeout) from None
        return time.monotonic() - started

    async def aclose(self) -> None:
        """Close the connection; requests that are under way are cancelled."""
        for stream in list(self._streams):
            stream.abandon()
        if self._channel is not None:
            await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def _connected(self) -> Any:
        """The stub of the connection, which belongs to the running event loop."""
        if self._stub is None:
            self._channel = grpc.aio.insecure_channel(self._endpoint.url, options=self._endpoint.channel_options())
            self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        return self._stub

    def _identity(self) -> tuple[str, tuple[tuple[str, str], ...]]:
        """The id of the request that is made now, and the headers that go with it."""
        return "", ()

    def _call(self, request: Any, timeout: float | None, metadata: Sequence[tuple[str, str]]) -> Any:
        """Send a request; return what reads like a gRPC call."""
        return self._connected().ModelStreamInfer(iter([request]), timeout=timeout, metadata=metadata)

    def _start(
        self,
        prompt: str | Sequence[int],
        stream: bool,
        timeout: float | None,
        prefix_key: str | None,
        options: Options,
    ) -> AsyncChunkStream:
        asyncio.get_running_loop()  # raises where there is none
        request = self._endpoint.infer_request(prompt, stream, options)
        request.id, headers = self._identity()
        metadata = (*headers, *self._endpoint.metadata(prefix_key))

        def call(seconds: float | None) -> Any:
            return self._call(request, seconds, metadata)

        seconds, retries = self._endpoint.seconds(timeout), self._endpoint.retries(timeout)
        chunks = AsyncChunkStream(call(seconds), call, self._endpoint, seconds, options, retries)
        self._streams.add(chunks)
        return chunks
