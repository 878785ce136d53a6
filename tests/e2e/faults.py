# SPDX-License-Identifier: Apache-2.0
"""Kills and stops a server's processes in the midst of streams, and measures what becomes of them."""

from __future__ import annotations

import json
import re
import signal
import socket
import threading
import time
from dataclasses import dataclass, field

from lightllm_client import LightLLMClient, LightLLMError
from tests.e2e.launch_command import LaunchCommand
from tests.polling import poll

PROMPT = "Once upon a time"
STREAMS_EACH = 4  # over gRPC and over HTTP
# What a stream is told.
REASONS = ("the server is stopped", "the engine stopped", "is not healthy")
# What is printed once a fault is found.
FOUND = r"error: the (server is ended|engine is replaced)|tritonserver has ended|the engine is started again"


class Streams:
    """Users that stream over gRPC and HTTP, each in a thread; what each has ended with, and when."""

    def __init__(self, grpc_url: str, http_port: int, max_tokens: int, count: int = STREAMS_EACH) -> None:
        self.begun = 0
        self.ends: list[tuple[float, str]] = []
        self._max_tokens = max_tokens
        self._threads = [threading.Thread(target=self._grpc, args=(grpc_url,), daemon=True) for _ in range(count)]
        self._threads += [threading.Thread(target=self._http, args=(http_port,), daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def __len__(self) -> int:
        return len(self._threads)

    def wait_begun(self) -> None:
        assert poll(lambda: self.begun >= 2 * len(self), 120), "the streams have not begun"

    def wait_ended(self, seconds: float) -> bool:
        return poll(lambda: len(self.ends) == len(self), seconds)

    def _grpc(self, url: str) -> None:
        end = "whole"
        try:
            with LightLLMClient(url, timeout=300, max_retries=0) as client:
                for _ in client.stream(PROMPT, max_tokens=self._max_tokens, ignore_eos=True):
                    self.begun += 1
        except LightLLMError as error:
            end = f"{type(error).__name__}: {error}"
        self.ends.append((time.monotonic(), end))

    def _http(self, port: int) -> None:
        body = json.dumps({"text_input": PROMPT, "max_tokens": self._max_tokens, "ignore_eos": True, "stream": True})
        head = f"POST /v2/models/lightllm/generate_stream HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        end = "closed"
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=300) as connection:
                connection.sendall((head + body).encode())
                for line in connection.makefile(encoding="utf-8"):
                    if match := re.search(r'"error":"(.*)"', line):
                        end = f"error event: {match[1]}"
                        break
                    if '"finish_reason":"length"' in line:
                        end = "whole"
                        break
                    self.begun += line.startswith("data:")
        except OSError:
            pass
        self.ends.append((time.monotonic(), end))


@dataclass
class Outcome:
    """Seconds from a fault: until it was found, the last stream had ended, and a request was answered again."""

    role: str
    number: signal.Signals
    found: float
    ended: float
    back: float
    ends: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        told = sum(any(reason in end for reason in REASONS) for end in self.ends)
        return (
            f"| {self.role} | {self.number.name} | {self.found:.1f} | {self.ended:.1f} | {self.back:.1f} |"
            f" {told} of {len(self.ends)} | {len(self.left)} |"
        )


HEADER = "| process | signal | found after s | streams ended after s | back after s | told the reason | left |"


def inject(command: LaunchCommand, role: str, number: signal.Signals, max_tokens: int = 2000) -> Outcome:
    """Send the signal to a process in the midst of streams, and wait until the service is back."""
    streams = Streams(command.grpc_url, command.http_port, max_tokens)
    streams.wait_begun()
    victim = command.find(role)
    traces, logged = command.traces(), len(command.log())
    begun = time.monotonic()
    victim.send_signal(number)
    assert poll(lambda: re.search(FOUND, command.log()[logged:]), 60), command.log()
    found = time.monotonic() - begun
    assert streams.wait_ended(60), f"{streams.ends} of {len(streams)}: {command.log()}"
    ended = max(moment for moment, _ in streams.ends) - begun
    assert poll(lambda: serves(command), 120, every=0.1), command.log()
    back = time.monotonic() - begun
    is_replaced = "starting tritonserver" in command.log()[logged:]
    left = [trace for trace in traces.left() if is_replaced and not trace.startswith(f"{command.process.pid}:")]
    return Outcome(role, number, found, ended, back, [end for _, end in streams.ends], left)


def serves(command: LaunchCommand) -> bool:
    """Whether both entries answer a request."""
    with LightLLMClient(command.grpc_url, timeout=10, max_retries=0) as client:
        try:
            return client.generate(PROMPT, max_tokens=1, ignore_eos=True).num_output_tokens == 1
        except LightLLMError:
            return False
