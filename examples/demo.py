# SPDX-License-Identifier: Apache-2.0
"""The demo: starts a server with the embedded model on free ports, streams the answer to one question to the terminal,
prints the calls that do the same, and stops the server. `./build.sh demo`"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until Signals takes it: no traceback of an import

import contextlib
import http.client
import json
import shlex
import socket
import subprocess
import sys
import time
from types import FrameType

from lightllm_client import LightLLMClient, LightLLMError, Unavailable
from lightllm_client.chat import ChatTemplate, default_model_dir

QUESTION = "What is the capital of Japan?"
MAX_TOKENS = 64
POLL_SECONDS = 0.5
CALL_SECONDS = 10.0
STOP_SECONDS = 90.0

PYTHON_CALL = f"""\
from lightllm_client import LightLLMClient
from lightllm_client.chat import ChatTemplate, default_model_dir

prompt = ChatTemplate.load(default_model_dir()).render([{{"role": "user", "content": "{QUESTION}"}}])
with LightLLMClient("127.0.0.1:8001") as client:
    for chunk in client.stream(prompt, max_tokens={MAX_TOKENS}):
        print(chunk.text, end="", flush=True)
"""


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def start_server(ports: list[int]) -> subprocess.Popen[bytes]:
    """The launch command with the embedded model, whatever the environment names."""
    http_port, grpc_port, metrics_port, openai_port = map(str, ports)
    command = [sys.executable, "-m", "lightllm_backend.serve", "--model_dir", "", "--host", "127.0.0.1"]
    command += ["--http_port", http_port, "--grpc_port", grpc_port, "--metrics_port", metrics_port]
    command += ["--openai_port", openai_port]
    return subprocess.Popen(command)


def is_ready(http_port: int, client: LightLLMClient) -> bool:
    """Whether Triton server has loaded all models, and the model `health` says that they work."""
    connection = http.client.HTTPConnection("127.0.0.1", http_port, timeout=CALL_SECONDS)
    try:
        connection.request("GET", "/v2/health/ready")
        if connection.getresponse().status != http.client.OK:
            return False
        client.health()
    except (OSError, http.client.HTTPException, Unavailable):
        return False
    finally:
        connection.close()
    return True


def wait_until_ready(server: subprocess.Popen[bytes], http_port: int, client: LightLLMClient) -> bool:
    """Wait until the server is ready; false if it ends instead."""
    while server.poll() is None:
        ready = is_ready(http_port, client)
        time.sleep(POLL_SECONDS)  # also at the end: the launch command, too, needs a moment to say what it has started
        if ready:
            return True
    return False


def ask(client: LightLLMClient) -> str:
    """Stream the answer to the terminal; the prompt that was sent."""
    prompt = ChatTemplate.load(default_model_dir()).render([{"role": "user", "content": QUESTION}])
    print(f"\n> {QUESTION}", flush=True)
    for chunk in client.stream(prompt, max_tokens=MAX_TOKENS):
        print(chunk.text, end="", flush=True)
    print("\n")
    return prompt


def curl_call(prompt: str) -> str:
    """The same request as a command for the terminal."""
    body = json.dumps({"text_input": prompt, "max_tokens": MAX_TOKENS, "stream": True})
    return f"curl -N 127.0.0.1:8000/v2/models/lightllm/generate_stream -d {shlex.quote(body)}"


def openai_call() -> str:
    """The same question to OpenAI's API as a command for the terminal."""
    body = json.dumps({"messages": [{"role": "user", "content": QUESTION}], "max_tokens": MAX_TOKENS, "temperature": 0})
    return f"curl 127.0.0.1:9000/v1/chat/completions -H 'Content-Type: application/json' -d {shlex.quote(body)}"


def show(server: subprocess.Popen[bytes], ports: list[int]) -> int:
    """Ask the server once it is ready, and print the calls that do the same; the exit code."""
    with LightLLMClient(f"127.0.0.1:{ports[1]}", timeout=120, max_retries=0) as client:
        if not wait_until_ready(server, ports[0], client):
            return server.wait() or 1
        prompt = ask(client)
    print("The same, from a server that `./build.sh serve` runs, with curl:\n")
    print(f"{curl_call(prompt)}\n")
    print("in OpenAI's API, of `./build.sh serve --openai_port 9000`:\n")
    print(f"{openai_call()}\n")
    print("and in Python, with .venv activated:\n")
    print(PYTHON_CALL, flush=True)
    return 0


class Signals:
    """SIGINT and SIGTERM, from construction on: they end the server, and what waits for it ends by that.

    They raise no exception, which could come while a server is being started, or in the midst of gRPC's work.
    """

    def __init__(self) -> None:
        self.have_come = False
        self._server: subprocess.Popen[bytes] | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def end(self, server: subprocess.Popen[bytes]) -> None:
        """Name the server that signals end, those that have come before as well."""
        self._server = server
        if self.have_come:
            self._end_server()

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self.have_come = True
        self._end_server()

    def _end_server(self) -> None:
        if self._server:
            for number in (signal.SIGTERM, signal.SIGINT):  # the launch command stops at once after a second signal
                self._server.send_signal(number)


def main() -> int:
    """Run the demo; the exit code."""
    signals = Signals()
    ports = free_ports(4)
    server = start_server(ports)
    signals.end(server)
    try:
        code = show(server, ports)
    except LightLLMError as error:
        code = 1
        if not signals.have_come:
            print(f"error: {error}", file=sys.stderr)
    finally:
        server.terminate()
        server.wait(STOP_SECONDS)
    return 130 if signals.have_come else code


if __name__ == "__main__":
    sys.exit(main())
