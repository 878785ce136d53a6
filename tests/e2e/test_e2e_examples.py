# SPDX-License-Identifier: Apache-2.0
"""The scripts in examples/ against a real server: each runs as a user runs it, and writes what it should."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lightllm_client
from lightllm_client import LightLLMClient
from tests.e2e.server import TritonServer
from tests.free_ports import free_ports

pytestmark = pytest.mark.e2e

EXAMPLES = Path(__file__).parents[2] / "examples"
LIMIT_SECONDS = 120


def run(script: str, url: str) -> str:
    """What a script writes to standard output when it is told the server's address."""
    environment = {**os.environ, "PYTHONPATH": str(Path(lightllm_client.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, EXAMPLES / script, url],
        env=environment, capture_output=True, text=True, check=False, timeout=LIMIT_SECONDS,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_stream(full_server: TritonServer, full_client: LightLLMClient) -> None:
    answer = full_client.generate("The capital of Japan is", max_tokens=16).text
    assert run("stream.py", full_server.grpc_url) == answer + "\n"


def test_async_many(full_server: TritonServer) -> None:
    lines = run("async_many.py", full_server.grpc_url).splitlines()
    assert len(lines) == 8
    assert lines[0] == "Japan: Tokyo."


def test_chat(full_server: TritonServer) -> None:
    lines = run("chat.py", full_server.grpc_url).splitlines()
    assert lines[0] == "> What is the capital of Japan?"
    assert "Tokyo" in lines[1]
    assert "> And of France?" in lines


def test_unary_tritonclient(full_server: TritonServer, full_client: LightLLMClient) -> None:
    answer = full_client.generate("The capital of Japan is", max_tokens=16).text
    assert run("unary_tritonclient.py", full_server.http_url) == answer + "\n"


def test_the_demo_knows_a_ready_server_and_streams_an_answer(
    full_server: TritonServer, full_client: LightLLMClient, capsys: pytest.CaptureFixture[str]
) -> None:
    specification = importlib.util.spec_from_file_location("demo", EXAMPLES / "demo.py")
    assert specification is not None
    assert specification.loader is not None
    demo = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(demo)
    [nobody] = free_ports(1)
    assert not demo.is_ready(nobody, full_client)
    with LightLLMClient(f"127.0.0.1:{nobody}") as other:
        assert not demo.is_ready(full_server.http_port, other)
    assert demo.wait_until_ready(full_server.process, full_server.http_port, full_client)
    prompt = demo.ask(full_client)
    assert prompt.endswith("What is the capital of Japan?<|im_end|>\n<|im_start|>assistant\n")
    assert capsys.readouterr().out == "\n> What is the capital of Japan?\nThe capital of Japan is Tokyo.\n\n"
