# SPDX-License-Identifier: Apache-2.0
"""What the synchronous and the asynchronous client share: where they call, and how far a stream has come.

The life of a request: the client opens a gRPC stream with the one message that it will ever send and closes it for
writing at once; the server ends the stream after the last response. Cancelling the stream cancels the request on the
server. tritonclient's own InferenceServerClient holds one stream at a time and leaves a thread behind for each stream
that is cancelled, so both clients open streams through the stub that tritonclient carries.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tritonclient.grpc import service_pb2

from lightllm_client.errors import (
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    LightLLMError,
    Unavailable,
    error_from_message,
    error_from_status,
)
from lightllm_client.options import Options
from lightllm_client.retries import MAX_RETRIES, Retries, check_max_retries
from lightllm_client.tensors import Chunk, chunk_from_response, infer_request

HEALTH_SECONDS = 10.0
PREFIX_KEY_HEADER = "x-prefix-key"  # by which a proxy chooses a replica


@dataclass(frozen=True)
class Endpoint:
    """The model that a client calls, on which server, and within how many seconds unless a call has its own timeout.

    max_retries: how often a request that got nothing is sent again (retries.py).
    """

    url: str = "127.0.0.1:8001"
    model: str = "lightllm"
    timeout: float | None = None
    max_retries: int = MAX_RETRIES

    def __post_init__(self) -> None:
        check_max_retries(self.max_retries)

    def channel_options(self) -> list[tuple[str, int]]:
        """The gRPC channel's options."""
        is_local = self.url.rpartition(":")[0] in ("127.0.0.1", "localhost", "[::1]")
        return [
            ("grpc.max_send_message_length", -1),
            ("grpc.max_receive_message_length", -1),
            # A client that waits for its server to start must notice soon that it has; the default goes to minutes.
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1000),
            # Windows of 64 KiB are enough without a way between. With probing, a stream that its caller does not read
            # gathers 4 MiB here.
            ("grpc.http2.bdp_probe", 0 if is_local else 1),
            # No HTTP proxy of the environment can reach this machine's own ports.
            ("grpc.enable_http_proxy", 0 if is_local else 1),
        ]

    def seconds(self, timeout: float | None) -> float | None:
        """The timeout of a call that has this one, or None, of its own."""
        return self.timeout if timeout is None else timeout

    def infer_request(self, prompt: str | Sequence[int], stream: bool, options: Options) -> Any:
        """The one message of a request."""
        return infer_request(self.model, prompt, stream, options)

    def retries(self, timeout: float | None) -> Retries:
        """The retries of a request that has this timeout, or None, of its own."""
        return Retries(self.max_retries, self.seconds(timeout))

    @staticmethod
    def metadata(prefix_key: str | None) -> tuple[tuple[str, str], ...]:
        """The gRPC metadata of a request: a digest of its prefix key, since a key may be any text of any length."""
        if prefix_key is None:
            return ()
        return ((PREFIX_KEY_HEADER, hashlib.sha256(prefix_key.encode()).hexdigest()[:32]),)

    @staticmethod
    def check_one_answer(options: Options) -> None:
        """Refuse options that ask for several answers."""
        if options.get("n", 1) != 1:
            raise InvalidArgument(f"n is {options['n']!r}; allowed: 1, or generate_several")

    def health_request(self) -> Any:
        """The message that asks the model `health`."""
        return service_pb2.ModelInferRequest(model_name="health")

    def error(self, call: Any, timeout: float | None) -> LightLLMError:
        """The error of a gRPC call that failed; `timeout` is the one that it was given."""
        error = error_from_status(call.code().name, call.details() or "no details")
        if isinstance(error, DeadlineExceeded) and timeout is not None:
            return DeadlineExceeded(f"the request did not finish within {timeout:g} s")
        if isinstance(error, Unavailable):
            return Unavailable(f"{self.url}: {error.message}")
        return error


class StreamState:
    """How far a request's stream has come: `finished` once its last chunk or its error is here, `closed` at its end."""

    finished = False
    closed = False

    def __init__(self, options: Options) -> None:
        self._num_answers = self._num_open = int(options.get("n", 1))  # of these, that have not ended

    def begin_again(self) -> None:
        """Expect the answers of a repeated request."""
        self.finished = False
        self._num_open = self._num_answers

    def take(self, message: Any) -> Chunk | None:
        """The chunk in a message of the server, None if it holds none; raises the error that it reports."""
        if message.error_message:
            self.finished = True
            raise error_from_message(message.error_message)
        if not message.infer_response.outputs:
            return None
        chunk = chunk_from_response(message.infer_response)
        self._num_open -= chunk.finish_reason != ""
        self.finished = self._num_open <= 0
        return chunk

    def end(self) -> None:
        """Close at the server's end of the stream; raises Internal if the last chunk is missing."""
        self.closed = True
        if not self.finished:
            raise Internal("the server ended the stream without a finish reason")
