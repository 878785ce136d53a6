# SPDX-License-Identifier: Apache-2.0
"""LightLLMClient: one connection, any number of requests on it at once, each a gRPC stream of its own."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import grpc  # type: ignore[import-untyped]
from tritonclient.grpc import service_pb2_grpc

from lightllm_client.endpoint import HEALTH_SECONDS, Endpoint, StreamState
from lightllm_client.errors import LightLLMError
from lightllm_client.options import Options
from lightllm_client.retries import Retries
from lightllm_client.tensors import Chunk, Generation

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class ChunkStream(Iterator[Chunk]):
    """The chunks of one request, as they are made.

    Ending early cancels the request on the server: `close()` (from any thread), leaving a `with` block, or dropping the
    last reference, as `break` in a loop over `client.stream(...)` does. A closed stream has no more chunks.
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
        self._closing = threading.Event()  # interrupts the pause before a retry
        self._reading = threading.Lock()  # gRPC allows one reader of a call at a time
        self._state = StreamState(options)
        self._repeat = repeat
        self._endpoint = endpoint
        self._timeout = timeout
        self._retries = retries

    def __next__(self) -> Chunk:
        while not self._state.closed:
            try:
                message = self._next_message()
                if message is None:
                    break
                chunk = self._state.take(message)
            except LightLLMError as error:
                if self._begins_again(error):
                    continue
                self.close()
                raise
            if chunk is not None:
                self._retries.stop()
                return chunk
        raise StopIteration

    def _begins_again(self, error: LightLLMError) -> bool:
        """Whether the request was sent again, after a pause, or the stream was closed meanwhile."""
        pause = self._retries.pause_after(error)
        if pause is None:
            return False
        self._end_call()
        self._state.begin_again()
        if not self._closing.wait(pause):
            self._call = self._repeat(self._retries.seconds_left())
            if self._state.closed:  # by another thread, which may have cancelled the call before this one
                self._call.cancel()
        return True

    def _next_message(self) -> Any | None:
        """The server's next message; None when the request is over or was closed here."""
        try:
            with self._reading:
                return next(self._call)
        except StopIteration:
            self._state.end()
            return None
        except grpc.RpcError:
            if self._state.closed:
                return None
            raise self._endpoint.error(self._call, self._timeout) from None

    def close(self) -> None:
        """Cancel the request unless it is over."""
        if not self._state.closed:
            self._end_call()
        self._state.closed = True
        self._closing.set()
        self._call.cancel()

    def _end_call(self) -> None:
        """Wait for the server's end of a request that is over.

        A cancellation that crosses the server's own end of the request leaves a part of it behind in the server, and
        the server then waits for that part when it stops.
        """
        if self._state.finished:
            with contextlib.suppress(grpc.RpcError), self._reading:
                for _ in self._call:
                    pass

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class LightLLMClient:
    """Calls the ensemble `model` of the Triton server whose gRPC port is at `url`.

    All methods may be called from several threads at once. `timeout` is in seconds and covers a whole request, to its
    last token; each call may set its own. A request that ends with Unavailable before its first chunk is sent again,
    after a growing pause, up to `max_retries` times. `prefix_key` names what the beginning of a prompt has in common
    with others, for example a session: a proxy in front of replicas sends requests with the same key to the replica
    that has that beginning in its cache. Errors are LightLLMError and its subclasses.
    """

    def __init__(
        self,
        url: str = Endpoint.url,
        model: str = Endpoint.model,
        timeout: float | None = Endpoint.timeout,
        max_retries: int = Endpoint.max_retries,
    ) -> None:
        self._endpoint = Endpoint(url, model, timeout, max_retries)
        self._channel = grpc.insecure_channel(url, options=self._endpoint.channel_options())
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        timeout: float | None = None,
        prefix_key: str | None = None,
        **options: Unpack[Options],
    ) -> Generation:
        """The whole answer to a prompt, which is text or token ids; `Options` lists the options."""
        self._endpoint.check_one_answer(options)
        with self._start(prompt, False, timeout, prefix_key, options) as chunks:
            return Generation.join(chunks)

    def generate_several(
        self,
        prompt: str | Sequence[int],
        *,
        timeout: float | None = None,
        prefix_key: str | None = None,
        **options: Unpack[Options],
    ) -> list[Generation]:
        """The whole answers to a prompt, as many as the option `n` says, in order of their seeds."""
        with self._start(prompt, True, timeout, prefix_key, options) as chunks:
            return Generation.join_several(chunks)

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        timeout: float | None = None,
        prefix_key: str | None = None,
        **options: Unpack[Options],
    ) -> ChunkStream:
        """The answer to a prompt, chunk by chunk as it is made; the request is on its way when this returns."""
        return self._start(prompt, True, timeout, prefix_key, options)

    def health(self, timeout: float | None = HEALTH_SECONDS) -> float:
        """How many seconds the server took to say that it works; raises Unavailable, with the reason, if it does not.

        The answer does not wait behind other requests, so a busy server is healthy too.
        """
        started = time.monotonic()
        try:
            self._stub.ModelInfer(self._endpoint.health_request(), timeout=timeout)
        except grpc.RpcError as error:
            raise self._endpoint.error(error, timeout) from None
        return time.monotonic() - started

    def close(self) -> None:
        """Close the connection; requests that are under way are cancelled."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _start(
        self,
        prompt: str | Sequence[int],
        stream: bool,
        timeout: float | None,
        prefix_key: str | None,
        options: Options,
    ) -> ChunkStream:
        request = self._endpoint.infer_request(prompt, stream, options)
        metadata, stub = self._endpoint.metadata(prefix_key), self._stub

        def call(seconds: float | None) -> Any:
            return stub.ModelStreamInfer(iter([request]), timeout=seconds, metadata=metadata)

        seconds, retries = self._endpoint.seconds(timeout), self._endpoint.retries(timeout)
        return ChunkStream(call(seconds), call, self._endpoint, seconds, options, retries)
