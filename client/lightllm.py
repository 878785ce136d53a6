# SPDX-License-Identifier: Apache-2.0
"""LightLLMClient: one connection, any number of requests on it at once, each a gRPC stream of its own.

A request's life: its stream is opened with the one message that it will ever send and is closed for writing at once;
the server then ends the stream after the last response. Cancelling the stream cancels the request on the server.
tritonclient's own InferenceServerClient holds one stream at a time and leaves a thread behind for each one that is
cancelled, so the streams are opened through the stub that tritonclient carries.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import grpc  # type: ignore[import-untyped]
from tritonclient.grpc import service_pb2, service_pb2_grpc

from client.errors import DeadlineExceeded, Internal, LightLLMError, Unavailable, error_from_message, error_from_status
from client.tensors import Chunk, Generation, Options, chunk_from_response, infer_request

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class ChunkStream(Iterator[Chunk]):
    """The chunks of one request, as they are made.

    Ending early cancels the request on the server: `close()` (from any thread), leaving a `with` block, or dropping the
    last reference, as `break` in a loop over `client.stream(...)` does. A closed stream has no more chunks.
    """

    def __init__(self, call: Any, url: str, timeout: float | None) -> None:
        self._call = call
        self._url = url
        self._timeout = timeout
        self._closed = False
        self._finished = False

    def __next__(self) -> Chunk:
        while not self._closed:
            response = self._next_response()
            if response is None:
                break
            if response.error_message:
                self._finished = True
                self.close()
                raise error_from_message(response.error_message)
            if response.infer_response.outputs:
                chunk = chunk_from_response(response.infer_response)
                self._finished = chunk.finish_reason != ""
                return chunk
        raise StopIteration

    def _next_response(self) -> Any | None:
        """The server's next message; None when the request is over or was closed here."""
        try:
            return next(self._call)
        except StopIteration:
            self.close()
            if self._finished:
                return None
            raise Internal("the server ended the stream without a finish reason") from None
        except grpc.RpcError:
            if self._closed:
                return None
            self.close()
            raise rpc_error(self._call, self._url, self._timeout) from None

    def close(self) -> None:
        """Cancel the request unless it is over.

        One that is over is left to end: a cancellation that crosses the server's own end of the request leaves a part
        of it behind in the server, which then waits for it when it is stopped.
        """
        if self._finished and not self._closed:
            with contextlib.suppress(grpc.RpcError):
                for _ in self._call:
                    pass
        self._closed = True
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def rpc_error(call: Any, url: str, timeout: float | None) -> LightLLMError:
    """What a gRPC call to `url` that failed has ended with."""
    error = error_from_status(call.code().name, call.details() or "no details")
    if isinstance(error, DeadlineExceeded) and timeout is not None:
        return DeadlineExceeded(f"the request did not finish within {timeout:g} s")
    if isinstance(error, Unavailable):
        return Unavailable(f"{url}: {error.message}")
    return error


class LightLLMClient:
    """Calls the ensemble `model` of the Triton server whose gRPC port is at `url`.

    All methods may be called from several threads at once. `timeout` is in seconds and covers a whole request, to its
    last token; each call may set its own. Errors are LightLLMError and its subclasses.
    """

    def __init__(self, url: str = "127.0.0.1:8001", model: str = "lightllm", timeout: float | None = None) -> None:
        self._url = url
        self._model = model
        self._timeout = timeout
        is_local = url.rpartition(":")[0] in ("127.0.0.1", "localhost", "[::1]")
        self._channel = grpc.insecure_channel(
            url,
            options=[
                ("grpc.max_send_message_length", -1),
                ("grpc.max_receive_message_length", -1),
                # A client that waits for its server to start must notice soon that it has; the default goes to minutes.
                ("grpc.initial_reconnect_backoff_ms", 100),
                ("grpc.max_reconnect_backoff_ms", 1000),
                # No HTTP proxy of the environment can reach this machine's own ports.
                ("grpc.enable_http_proxy", 0 if is_local else 1),
            ],
        )
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def generate(
        self, prompt: str | Sequence[int], *, timeout: float | None = None, **options: Unpack[Options]
    ) -> Generation:
        """The whole answer to a prompt, which is text or token ids; `Options` lists the options."""
        with self._start(prompt, False, timeout, options) as chunks:
            return Generation.join(chunks)

    def stream(
        self, prompt: str | Sequence[int], *, timeout: float | None = None, **options: Unpack[Options]
    ) -> ChunkStream:
        """The answer to a prompt, chunk by chunk as it is made; the request is on its way when this returns."""
        return self._start(prompt, True, timeout, options)

    def health(self, timeout: float | None = 10.0) -> float:
        """How many seconds the server took to say that it works; raises Unavailable, with the reason, if it does not.

        The answer does not wait behind other requests, so a busy server is healthy too.
        """
        started = time.monotonic()
        try:
            self._stub.ModelInfer(service_pb2.ModelInferRequest(model_name="health"), timeout=timeout)
        except grpc.RpcError as error:
            raise rpc_error(error, self._url, timeout) from None
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

    def _start(self, prompt: str | Sequence[int], stream: bool, timeout: float | None, options: Options) -> ChunkStream:
        request = infer_request(self._model, prompt, stream, options)
        seconds = self._timeout if timeout is None else timeout
        return ChunkStream(self._stub.ModelStreamInfer(iter([request]), timeout=seconds), self._url, seconds)
