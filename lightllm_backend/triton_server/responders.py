# SPDX-License-Identifier: Apache-2.0
"""Responders: a stream's way to the server's response sender, which the answers to one prompt share. No torch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Generic, TypeVar

from lightllm_backend.messages.ensemble_messages import ChunkMessage
from lightllm_backend.messages.seal import Seal
from lightllm_backend.request import RequestError, RequestOptions, TokenChunk
from lightllm_backend.text.response import DecodeState, Response
from lightllm_backend.text.tokenizer import Tokenizer
from lightllm_backend.triton_server.responses import (
    ServerSender,
    answers_response,
    direct_response,
    error_response,
    sealed_chunk,
)

_Part = TypeVar("_Part")


class AnswersSender(Generic[_Part]):
    """The response sender of a request, which its n answers share. The end of the last answer is the final response.

    Each part of an answer goes at once, or the last parts of all n together. Nothing follows an error but the end.
    """

    def __init__(
        self, request: Any, num_answers: int, together: bool, make_response: Callable[[Sequence[_Part]], Any]
    ) -> None:
        """make_response: makes a response of one part, or of the last parts of all answers in order."""
        self.sender = ServerSender(request)
        self._together = together and num_answers > 1
        self._make_response = make_response
        self._lock = threading.Lock()  # guards what follows, and the order of responses
        self._num_open = num_answers
        self._last_parts: dict[int, _Part] = {}
        self._failed = False

    def send(self, number: int, part: _Part, is_last: bool, is_error: bool) -> None:
        """Take a part of the answer with this number."""
        with self._lock:
            self._num_open -= is_last
            final = is_last and self._num_open == 0
            parts = self._ready(number, part, final, is_error)
            if parts or final:
                self.sender.send(self._make_response(parts) if parts else None, final)

    def _ready(self, number: int, part: _Part, final: bool, is_error: bool) -> list[_Part]:
        """The parts to send now. An error stands for all answers."""
        had_failed, self._failed = self._failed, self._failed or is_error
        if not self._together:
            return [] if had_failed else [part]
        if is_error:
            self._last_parts = {number: part}
        elif not had_failed:
            self._last_parts[number] = part
        return [self._last_parts[one] for one in sorted(self._last_parts)] if final else []


class GenerationResponder:
    """The Responder of generation: sends an answer's chunks to the detokenizer."""

    def __init__(
        self, answers: AnswersSender[ChunkMessage], number: int, uid: str, state: DecodeState, seal: Seal
    ) -> None:
        self._answers = answers
        self._number = number
        self._uid = uid
        self._first_state = replace(state, index=number).pack()
        self._seal = seal

    @staticmethod
    def sender(request: Any, options: RequestOptions, seal: Seal) -> AnswersSender[ChunkMessage]:
        """Make the sender that the responders of a request's answers share."""

        def sealed(parts: Sequence[ChunkMessage]) -> Any:
            first, *others = parts
            return sealed_chunk(seal, replace(first, others=tuple(one.pack() for one in others)) if others else first)

        return AnswersSender(request, options.sampling.n, not options.stream, sealed)

    def send(self, chunk: TokenChunk, state: bytes | None, check_client: bool) -> None:
        message = ChunkMessage(self._uid, chunk, self._first_state if state is None else state, check_client)
        self._answers.send(self._number, message, chunk.finish_reason is not None, chunk.error is not None)

    def probe(self) -> None:
        message = ChunkMessage(self._uid, None, check_client=True)
        self._answers.sender.send(sealed_chunk(self._seal, message), final=False)

    def is_cancelled(self) -> bool:
        return self._answers.sender.is_cancelled()


class DirectResponder:
    """The Responder of generation for a direct caller, who gets tokens, and errors as errors."""

    def __init__(self, answers: AnswersSender[TokenChunk], number: int) -> None:
        self._answers = answers
        self._number = number

    @staticmethod
    def sender(request: Any, options: RequestOptions) -> AnswersSender[TokenChunk]:
        """Make the sender that the responders of a request's answers share."""

        def response(parts: Sequence[TokenChunk]) -> Any:
            [chunk] = parts
            return error_response(chunk.error) if chunk.error is not None else direct_response(chunk)

        return AnswersSender(request, options.sampling.n, False, response)

    def send(self, chunk: TokenChunk, state: bytes | None, check_client: bool) -> None:  # noqa: ARG002, as a Responder's
        self._answers.send(self._number, chunk, chunk.finish_reason is not None, chunk.error is not None)

    def probe(self) -> None:
        raise AssertionError("a direct call has no detokenizer to probe")

    def is_cancelled(self) -> bool:
        return self._answers.sender.is_cancelled()


class UnaryResponder:
    """The Responder of lightllm_unary: sends one response, of what `decode` makes of each answer's only chunk."""

    def __init__(
        self,
        answers: AnswersSender[Response | RequestError],
        number: int,
        decode: Callable[[TokenChunk], Response | None],
    ) -> None:
        self._answers = answers
        self._number = number
        self._decode = decode

    @staticmethod
    def sender(request: Any, num_answers: int, tokenizer: Tokenizer) -> AnswersSender[Response | RequestError]:
        """Make the sender that the responders of a request's answers share."""

        def response(parts: Sequence[Response | RequestError]) -> Any:
            responses = [part for part in parts if isinstance(part, Response)]
            errors = [part for part in parts if isinstance(part, RequestError)]
            return error_response(errors[0]) if errors else answers_response(responses, tokenizer)

        return AnswersSender(request, num_answers, True, response)

    def send(self, chunk: TokenChunk, state: bytes | None, check_client: bool) -> None:  # noqa: ARG002, as a Responder's
        part = chunk.error or self._decode(chunk)
        assert part is not None, "the last chunk always gives a response"
        self._answers.send(self._number, part, True, chunk.error is not None)

    def probe(self) -> None:
        raise AssertionError("a unary call has no detokenizer to probe")

    def is_cancelled(self) -> bool:
        return self._answers.sender.is_cancelled()
