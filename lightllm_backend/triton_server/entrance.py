# SPDX-License-Identifier: Apache-2.0
"""Entrance: the way of a client's request to a prompt, in the tokenizer step and in lightllm_unary. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightllm_backend.config import EngineConfig
from lightllm_backend.lengths import LengthLimits
from lightllm_backend.messages.engine_load import Door, EngineLoad
from lightllm_backend.options import ParsedRequest
from lightllm_backend.request import RequestError
from lightllm_backend.text.prompt import Prompt, check_prompt, encode_prompt
from lightllm_backend.text.prompt_lane import LongPrompt, PromptLane
from lightllm_backend.text.tokenizer import Tokenizer
from lightllm_backend.triton_server.requests import is_probe, read_deadline, read_request
from lightllm_backend.triton_server.responses import ServerSender, error_response
from lightllm_backend.triton_server.telemetry import Telemetry

# Prompts up to this size are encoded at once: encoding them takes 1.5 ms, which nobody notices.
SHORT_PROMPT_BYTES = 4096
# The lane holds that many prompts of the maximum size: with the default of 1 MiB, a minute's work and 64 MiB.
LONGEST_PROMPTS = 64


@dataclass(frozen=True)
class Entered:
    """A request that has come in: its options, its prompt and its deadline in time.monotonic() seconds."""

    request: Any  # Triton server's
    parsed: ParsedRequest
    prompt: Prompt
    deadline: float | None


class Entrance:
    """Reads requests, refuses what cannot be served, and encodes prompts: short ones at once, long ones in a lane.

    lengths: by the settings and config.json; the KV pool may allow less.
    go_on: gets what has come in, on the calling thread or the lane's. It returns the response, or None if it will come
    from a response sender; an error that it raises is the answer.
    """

    def __init__(
        self,
        config: EngineConfig,
        tokenizer: Tokenizer,
        lengths: LengthLimits,
        telemetry: Telemetry,
        run_directory: Path,
        go_on: Callable[[Entered], Any],
    ) -> None:
        self._load = EngineLoad(run_directory)
        self.door = Door(self._load)
        self._max_prompt_bytes = config.max_prompt_bytes
        self._tokenizer = tokenizer
        self._lengths_without_pool = lengths
        self._telemetry = telemetry
        self._go_on = go_on
        self._lane = PromptLane(config.max_queue_size, LONGEST_PROMPTS * config.max_prompt_bytes)

    def take(self, request: Any) -> Any:
        """Take a request. Return its response, or None if that will come from the request's response sender.

        `execute` returns what is there at once: a response sender for each would take this process longer.
        """
        try:
            deadline = read_deadline(request)
            parsed = read_request(request)
            self.door.check(parsed.options.tenant, lambda: is_probe(request))
            size = check_prompt(parsed, self._tokenizer, self._max_prompt_bytes, self._lengths())
            if size <= SHORT_PROMPT_BYTES:
                return self._enter(request, parsed, deadline)
            self._lane.put(self._long_prompt(request, parsed, size, deadline))
        except Exception as error:  # noqa: BLE001 (a request without an answer hangs)
            return self._refusal(request, error)
        return None

    def close(self) -> None:
        """Refuse the prompts that wait in the lane."""
        self._lane.close()

    def _long_prompt(self, request: Any, parsed: ParsedRequest, size: int, deadline: float | None) -> LongPrompt:
        sender = ServerSender(request)

        def encode() -> None:
            try:
                response = self._enter(request, parsed, deadline)
            except Exception as error:  # noqa: BLE001 (a request without an answer hangs)
                response = self._refusal(request, error)
            if response is not None:
                sender.send(response, final=True)

        def refuse(error: RequestError) -> None:
            sender.send(self._refusal(request, error), final=True)

        return LongPrompt(size, deadline, sender.is_cancelled, encode, refuse)

    def _enter(self, request: Any, parsed: ParsedRequest, deadline: float | None) -> Any:
        prompt = encode_prompt(parsed, self._tokenizer, self._lengths())
        return self._go_on(Entered(request, parsed, prompt, deadline))

    def _lengths(self) -> LengthLimits:
        """The limits of a request: the engine's, once its worker has sized the KV pool."""
        pool_tokens, longest = self._load.pool()
        without_pool = self._lengths_without_pool
        return without_pool.within_pool(pool_tokens, longest) if pool_tokens else without_pool

    def _refusal(self, request: Any, error: Exception) -> Any:
        self._telemetry.refused(request, error)
        return error_response(error)
