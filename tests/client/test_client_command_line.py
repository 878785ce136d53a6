# SPDX-License-Identifier: Apache-2.0
"""The command `lightllm` against the fake server: what it sends, writes and exits with."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import lightllm_client
from lightllm_client.__main__ import main

SENTENCE = "The capital of Japan is Tōkyō 🗼."
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(lightllm_client.__file__).parents[1])}
SOON = 20.0  # seconds; an upper bound, reached only by a failure


@dataclass
class Result:
    exit_code: int
    stdout: str
    stderr: str


@pytest.fixture
def call(fake_server, capsys, monkeypatch):
    def call(*arguments, standard_input=b""):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(standard_input)))
        try:
            exit_code = main([*arguments, "--url", fake_server.url])
        except SystemExit as end:
            exit_code = end.code
        return Result(exit_code, *capsys.readouterr())

    return call


@pytest.mark.parametrize("streaming", [(), ("--stream",), ("--no-stream",)])
def test_generate_writes_the_answer(call, fake_server, streaming):
    result = call("generate", "What?", "--max-tokens", "8", *streaming)
    assert (result.exit_code, result.stdout, result.stderr) == (0, SENTENCE + "\n", "")
    assert fake_server.requests[0].value("stream", None) is (streaming != ("--no-stream",))
    assert fake_server.requests[0].value("text_input", None) == "What?"


def test_text_is_written_as_it_is_made(fake_server):
    command = [
        sys.executable,
        "-m",
        "lightllm_client",
        "generate",
        "endless",
        "--timeout",
        "60",
        "--url",
        fake_server.url,
    ]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert process.stdout.read(11) == b"The capital"
        assert not fake_server.requests[0].ended.is_set()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=SOON)
    finally:
        process.kill()
    assert process.returncode == 130
    assert errors == b""
    assert fake_server.requests[0].cancelled.wait(SOON)


def test_every_option_is_sent(call, fake_server):
    result = call(
        *("generate", "What?", "--max-tokens", "3", "--do-sample", "--temperature", "0.5", "--top-p", "0.25"),
        *(
            "--top-k",
            "40",
            "--min-p",
            "0.25",
            "--presence-penalty",
            "1",
            "--frequency-penalty",
            "-1",
            "--repetition-penalty",
            "1.5",
        ),
        *("--logit-bias", '{"5": -100}', "--top-logprobs", "2"),
        *("--seed", str(2**64 - 1), "--min-tokens", "2", "--ignore-eos", "--stop-words", "a", "--stop-words", "b"),
        *("--stop-token-ids", "5", "--stop-token-ids", "0"),
        *("--no-exclude-input-in-output", "--no-parse-special", "--no-skip-special-tokens", "--return-log-probs"),
    )
    assert result.exit_code == 0
    assert {name: values for name, (_, _, values) in fake_server.requests[0].tensors.items()} == {
        "text_input": ["What?"],
        "stream": [True],
        "max_tokens": [3],
        "do_sample": [True],
        "temperature": [0.5],
        "top_p": [0.25],
        "top_k": [40],
        "min_p": [0.25],
        "presence_penalty": [1],
        "frequency_penalty": [-1],
        "repetition_penalty": [1.5],
        "logit_bias": ['{"5": -100}'],
        "seed": [2**64 - 1],
        "min_tokens": [2],
        "ignore_eos": [True],
        "stop_words": ["a", "b"],
        "stop_token_ids": [5, 0],
        "exclude_input_in_output": [False],
        "parse_special": [False],
        "skip_special_tokens": [False],
        "return_log_probs": [True],
        "top_logprobs": [2],
    }


def test_what_is_not_given_is_not_sent(call, fake_server):
    call("generate", "What?")
    assert set(fake_server.requests[0].tensors) == {"text_input", "stream"}


@pytest.mark.parametrize("streaming", ["--stream", "--no-stream"])
def test_verbose_writes_statistics_to_standard_error(call, streaming):
    result = call(
        "generate", "What?", "--max-tokens", "2", "--verbose", "--return-log-probs", "--top-logprobs", "2", streaming
    )
    assert result.stdout == "The capital\n"
    assert "log probabilities: 0:-0.5000 1:-0.5000; sum -1.0000" in result.stderr
    assert "likeliest in place of 1: 1:-0.5000 2:-1.5000" in result.stderr
    assert "7 tokens in, 2 out in" in result.stderr
    assert "finish reason: length" in result.stderr


def test_a_dash_reads_standard_input_as_it_is(call, fake_server):
    assert call("generate", "-", standard_input="Was?\n尾\n".encode()).exit_code == 0
    assert fake_server.requests[0].value("text_input", None) == "Was?\n尾\n"


def test_standard_input_that_is_not_utf8_is_wrong_usage(call, fake_server):
    result = call("generate", "-", standard_input=b"\xff")
    assert result.exit_code == 2
    assert "standard input is not UTF-8" in result.stderr
    assert fake_server.requests == []


def test_an_error_is_one_line_and_exit_code_1(call):
    result = call("generate", "error INVALID_ARG: top_p is 1.5;\nallowed: 0 < top_p ≤ 1")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "error: INVALID_ARG: top_p is 1.5; allowed: 0 < top_p ≤ 1\n"


def test_an_error_in_mid_stream_comes_after_the_text(call):
    result = call("generate", "late error INTERNAL: the engine died")
    assert (result.exit_code, result.stdout) == (1, "The capital\n")
    assert result.stderr == "error: INTERNAL: the engine died\n"


def test_a_value_that_no_tensor_holds_is_an_error(call):
    result = call("generate", "What?", "--max-tokens", str(2**31))
    assert result.exit_code == 1
    assert result.stderr.startswith("error: INVALID_ARG: max_tokens is 2147483648; allowed: ")


def test_a_timeout_cancels(call, fake_server):
    result = call("generate", "endless", "--no-stream", "--timeout", "0.2")
    assert result.exit_code == 1
    assert result.stderr == "error: DEADLINE_EXCEEDED: the request did not finish within 0.2 s\n"
    assert fake_server.requests[0].cancelled.wait(SOON)


def test_chat_applies_the_template(call, fake_server, tmp_path):
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}:{% endif %}"
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    call("generate", "What?", "--chat", "--model-dir", str(tmp_path))
    call("generate", "What?", "--chat", "--system", "Be brief.", "--model-dir", str(tmp_path))
    prompts = [request.value("text_input", None) for request in fake_server.requests]
    assert prompts == ["<user>What?:", "<system>Be brief.<user>What?:"]


def test_chat_without_a_template_is_an_error(call, fake_server, monkeypatch, tmp_path):
    monkeypatch.setenv("LIGHTLLM_CACHE", str(tmp_path))
    result = call("generate", "What?", "--chat")
    assert result.exit_code == 1
    assert result.stderr == f"error: the model directory {tmp_path}/SmolLM2-135M-Instruct does not exist\n"
    assert fake_server.requests == []


def test_chat_without_jinja2_says_what_to_install(call, fake_server, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.delitem(sys.modules, "lightllm_client.chat", raising=False)
    result = call("generate", "What?", "--chat")
    assert result.exit_code == 1
    assert result.stderr == "error: --chat needs jinja2: pip install 'lightllm-client[chat]'\n"
    assert fake_server.requests == []


def test_a_reader_that_goes_away_ends_the_command_quietly(fake_server):
    command = [sys.executable, "-m", "lightllm_client", "generate", "endless", "--timeout", "60"]
    process = subprocess.Popen(
        [*command, "--url", fake_server.url], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        assert process.stdout.read(3) == b"The"
        process.stdout.close()
        assert process.wait(SOON) == 1
        assert process.stderr.read() == b""
    finally:
        process.kill()
    assert fake_server.requests[0].cancelled.wait(SOON)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "What?", "--max-tokens", "many"), "argument --max-tokens: invalid int value: 'many'"),
        (("generate", "What?", "--max-tok", "3"), "unrecognized arguments: --max-tok 3"),
        (("generate",), "required: PROMPT"),
        (("ask",), "invalid choice: 'ask'"),
    ],
)
def test_wrong_usage_is_exit_code_2(call, fake_server, arguments, message):
    result = call(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert fake_server.requests == []


def test_the_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"lightllm {lightllm_client.__version__}\n"


def test_a_system_message_needs_chat(call):
    result = call("generate", "What?", "--system", "Be brief.")
    assert result.exit_code == 2
    assert "--system needs --chat" in result.stderr


def test_health(call, fake_server):
    result = call("health")
    assert result.exit_code == 0
    assert result.stdout.startswith("healthy: answered in 0.")
    assert fake_server.requests[0].model == "health"


def test_health_without_a_server_fails(call, fake_server):
    fake_server.stop()
    result = call("health")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"error: UNAVAILABLE: {fake_server.url}: ")
    assert result.stderr.count("\n") == 1
