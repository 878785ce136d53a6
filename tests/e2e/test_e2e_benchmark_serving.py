# SPDX-License-Identifier: Apache-2.0
"""The service benchmark at a small rate against the embedded model: what it asks is answered, and it tells no less.

Nothing is asserted about speed.
"""

import contextlib
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner, Result

from lightllm_backend.launch.embedded_model import embedded_model_directory
from perf.benchmark_serving import main
from perf.report.serving import serving
from tests.e2e.server import TritonServer
from tests.polling import poll

pytestmark = pytest.mark.e2e

LENGTHS = [(4, 5), (40, 8), (9, 1), (60, 6), (30, 12), (7, 3)]


def benchmark(server: TritonServer, folder: Path, *arguments: str, protocol: str = "grpc") -> tuple[Result, Path]:
    table = folder / "lengths.csv"
    table.write_text("\n".join(["prompt_tokens,output_tokens", *(f"{prompt},{output}" for prompt, output in LENGTHS)]))
    out = folder / "result.json"
    addresses = ["--address", server.grpc_url if protocol == "grpc" else server.http_url]
    addresses += ["--metrics-address", f"127.0.0.1:{server.metrics_port}", "--protocol", protocol]
    command = ["--lengths", str(table), *addresses, "--out", str(out), "--processes", "1", *arguments]
    return CliRunner().invoke(main, command), out


@pytest.mark.parametrize(
    ("protocol", "arguments"),
    [
        ("grpc", ["--request-rate", "10", "--processes", "2"]),
        ("grpc", ["--prompts", "text", "--tokenizer", str(embedded_model_directory()), "--sweep", "10,inf"]),
        ("grpc", ["--no-streaming"]),
        ("http", ["--concurrency", "2", "--shared-prefix", "10"]),
        ("http", ["--no-streaming", "--prompts", "text", "--tokenizer", str(embedded_model_directory())]),
    ],
    ids=["grpc", "grpc-text-sweep", "grpc-unary", "http", "http-unary-text"],
)
def test_everything_that_is_asked_is_answered(
    server: TritonServer, tmp_path: Path, protocol: str, arguments: list[str]
) -> None:
    before = server.metrics()["lightllm_generated_tokens_total"]
    answer, out = benchmark(server, tmp_path, *arguments, protocol=protocol)
    assert answer.exit_code == 0, answer.output
    runs: list[dict[str, Any]] = json.loads(out.read_text())["runs"]
    assert len(runs) == (2 if "--sweep" in arguments else 1)
    prefix = 10 if "--shared-prefix" in arguments else 0
    for run in runs:
        assert run["requests"] == len(LENGTHS)
        assert run["prompt_tokens"] == sum(prompt + prefix for prompt, _ in LENGTHS)
        assert run["output_tokens"] == sum(output for _, output in LENGTHS)
        assert ("time_to_first_token" in run) == ("--no-streaming" not in arguments)
        assert run["timeline"][-1]["kv_tokens_total"] == server.metrics()["lightllm_kv_tokens_total"]
    asked = len(runs) * sum(output for _, output in LENGTHS)
    assert poll(lambda: server.metrics()["lightllm_generated_tokens_total"] - before >= asked)


def test_a_text_for_another_tokenizer_is_noticed(server: TritonServer, tmp_path: Path) -> None:
    answer, out = benchmark(server, tmp_path, "--prompts", "text")
    assert answer.exit_code == 1
    assert "prompt tokens, " in str(answer.output)
    assert "the server counted" in str(answer.output)
    assert not out.exists()


def test_a_request_that_is_refused_ends_it(server: TritonServer, tmp_path: Path) -> None:
    answer, out = benchmark(server, tmp_path, "--max-tokens", "100000")
    assert answer.exit_code == 1
    assert "100000 wanted), after 0 tokens: INVALID_ARG" in str(answer.output)
    assert not out.exists()


@pytest.mark.parametrize(
    "how",
    ["--launch --protocol openai --set front_processes=2 --set worker_python=perf/sleeping_engine.py", "--in-process"],
)
def test_what_it_starts_itself_answers_too(tmp_path: Path, how: str) -> None:
    out = tmp_path / "result.json"
    arguments = [
        *how.split(),
        "--model",
        "tiny",
        "--set",
        "device=cpu",
        "--set",
        "dtype=float32",
        "--set",
        "log_stats_interval=0",
    ]
    answer = CliRunner().invoke(
        main, [*arguments, "--random", "8", "5", "--num-prompts", "4", "--processes", "1", "--out", str(out)]
    )
    assert answer.exit_code == 0, answer.output
    result = json.loads(out.read_text())
    settings = {"device": "cpu", "dtype": "float32", "log_stats_interval": "0"}
    assert result["settings"] == settings | ({"front_processes": "2"} if "front" in how else {}), "and no paths"
    assert result["system"] == ("server" if "--launch" in how else "engine")
    [run] = result["runs"]
    assert (run["requests"], run["prompt_tokens"], run["output_tokens"]) == (4, 32, 20)
    assert len(serving(result | {"stem": "x"})) == 5


def is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def test_what_it_starts_ends_with_it(sleeping_python: Path) -> None:
    command = [sys.executable, "-m", "perf.benchmark_serving", "--launch", "--model", "tiny"]
    command += ["--set", f"worker_python={sleeping_python}"]
    command += ["--random", "8", "500", "--num-prompts", "100", "--request-rate", "1", "--processes", "1"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        own = psutil.Process(process.pid)
        # The command that serves, Triton server, its stubs, the worker.
        assert poll(lambda: len(own.children(recursive=True)) >= 7)
        started = own.children(recursive=True)
        process.terminate()
        assert process.wait(60.0) == 128 + signal.SIGTERM
        assert poll(lambda: not any(map(is_alive, started)))


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    answer = CliRunner().invoke(
        main, ["--launch", "--set", "kv_dtype=int7", "--random", "8", "5", "--num-prompts", "1"]
    )
    assert answer.exit_code == 1
    assert "kv_dtype is 'int7'; allowed: auto | int8" in str(answer.output)
