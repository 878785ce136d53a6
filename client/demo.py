# SPDX-License-Identifier: Apache-2.0
"""The demo: starts a server with the embedded model on free ports, streams the answer to one question to the terminal,
prints the calls that do the same, and stops the server. `python -m client.demo`"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading

from client.chat import ChatTemplate, default_model_dir
from client.errors import LightLLMError
from client.lightllm import LightLLMClient

QUESTION = "What is the capital of Japan?"
MAX_TOKENS = 64
SERVER_IS_READY = b"ready after"  # what the launch command says then
STOP_SECONDS = 90.0

PYTHON_CALL = f"""\
from client import LightLLMClient
from client.chat import ChatTemplate, default_model_dir

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
    http_port, grpc_port, metrics_port = map(str, ports)
    command = [sys.executable, "-m", "lightllm_backend.serve", "--model_dir", "", "--host", "127.0.0.1"]
    command += ["--http_port", http_port, "--grpc_port", grpc_port, "--metrics_port", metrics_port]
    return subprocess.Popen(command, stderr=subprocess.PIPE)


def wait_until_ready(server: subprocess.Popen[bytes]) -> bool:
    """Show what the server says until it is ready, and afterwards too; false if it ends instead."""
    assert server.stderr is not None
    descriptor = server.stderr.fileno()
    said = b""
    while data := os.read(descriptor, 65536):
        write_error(data)
        said = said[-len(SERVER_IS_READY) :] + data
        if SERVER_IS_READY in said:
            threading.Thread(target=show_rest, args=(descriptor,), daemon=True).start()
            return True
    return False


def show_rest(descriptor: int) -> None:
    while data := os.read(descriptor, 65536):
        write_error(data)


def write_error(data: bytes) -> None:
    sys.stderr.buffer.write(data)
    sys.stderr.buffer.flush()


def ask(grpc_port: int) -> str:
    """Stream the answer to the terminal; the prompt that was sent."""
    prompt = ChatTemplate.load(default_model_dir()).render([{"role": "user", "content": QUESTION}])
    print(f"\n> {QUESTION}", flush=True)
    with LightLLMClient(f"127.0.0.1:{grpc_port}", timeout=120) as client:
        for chunk in client.stream(prompt, max_tokens=MAX_TOKENS):
            print(chunk.text, end="", flush=True)
    print("\n")
    return prompt


def curl_call(prompt: str) -> str:
    body = json.dumps({"text_input": prompt, "max_tokens": MAX_TOKENS, "stream": True})
    return f"curl -N 127.0.0.1:8000/v2/models/lightllm/generate_stream -d {shlex.quote(body)}"


def main() -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C, so that the server is stopped
    ports = free_ports(3)
    server = start_server(ports)
    try:
        if not wait_until_ready(server):
            return server.wait() or 1
        prompt = ask(ports[1])
        print("The same, from a server that `./build.sh serve` runs, with curl:\n")
        print(f"{curl_call(prompt)}\n")
        print("and in Python, in this folder with .venv activated:\n")
        print(PYTHON_CALL, flush=True)
        return 0
    except LightLLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        if server.poll() is None:
            server.terminate()
        server.wait(STOP_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
