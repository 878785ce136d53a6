# SPDX-License-Identifier: Apache-2.0
"""The launch command: settings and checks, and the supervision of a stand-in for tritonserver."""

import contextlib
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner

from lightllm_backend import serve
from lightllm_backend.config import EngineConfig
from tests.polling import poll

ROOT = Path(__file__).resolve().parents[2]
MODEL = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 512, "hidden_size": 16, "intermediate_size": 32,
    "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
}  # fmt: skip

# Says that it is ready, has an engine, and answers requests until the file `broken` is there.
FAKE_TRITONSERVER = """
import os, signal, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from lightllm_backend.messages.engine_messages import EngineInfo
from lightllm_backend.messages.run_directory import run_directory_of
from lightllm_backend.worker.server import EngineServer
from lightllm_backend.lengths import LengthLimits

folder = Path(sys.argv[1])
options = dict(argument.split("=", 1) for argument in sys.argv[2:])
(folder / "argv").write_text(" ".join(sys.argv[2:]))
(folder / "model_dir").write_text(os.environ.get("LIGHTLLM_MODEL_DIR", ""))
if (folder / "fails").exists():
    print("the server's own reason", file=sys.stderr)
    sys.exit(9)

class Handler(BaseHTTPRequestHandler):
    def log_message(self, *arguments): pass
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def do_POST(self):
        (folder / "probed").touch()
        self.send_response(400 if (folder / "broken").exists() else 200)
        self.end_headers()
        self.wfile.write(b"a stub is gone")

signal.signal(signal.SIGTERM, lambda *_: os._exit(7))
lengths = LengthLimits(2048, "max_req_input_len", 8192, "the model's limit")
info = EngineInfo("some/model", "bfloat16", "cuda:0", 10, (2,), lengths, 123456, {"KV pool": 3 * 2**30})
read_end, write_end = os.pipe()
engine = EngineServer(str(run_directory_of(os.getpid()) / "engine"), info, read_end)
server = ThreadingHTTPServer((options["--http-address"], int(options["--http-port"])), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
while True:
    list(engine.receive(0.05))
"""


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    shutil.copytree(ROOT / "tests" / "data" / "byte_level", directory)
    (directory / "config.json").write_text(json.dumps(MODEL))
    return directory


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    (tmp_path / "repository" / "generation").mkdir(parents=True)
    (tmp_path / "repository" / "generation" / "config.pbtxt").write_text("")
    return tmp_path / "repository"


@pytest.fixture
def settings(model_dir: Path) -> dict[str, str]:
    http_port, grpc_port, metrics_port = map(str, free_ports(3))
    ports = {"http_port": http_port, "grpc_port": grpc_port, "metrics_port": metrics_port}
    return {"model_dir": str(model_dir), "max_req_total_len": "32", "max_req_input_len": "16", **ports}


ENVIRONMENT = {"LIGHTLLM_TRITONSERVER": "some tritonserver", "PATH": os.environ["PATH"]}


# Settings


def test_every_setting_is_an_option_with_its_help_and_default() -> None:
    help_text = " ".join(CliRunner().invoke(serve.command, ["--help"], terminal_width=200).output.split())
    for setting in fields(EngineConfig):
        assert f"--{setting.name} VALUE" in help_text
        assert " ".join(setting.metadata["help"].split()) in help_text
    assert "default: 1000]" in help_text
    assert "default: false]" in help_text


def test_names_may_have_dashes_and_what_follows_two_dashes_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def prepare(*arguments: Any) -> None:
        seen.extend(arguments)
        raise serve.ServeError("seen")

    monkeypatch.setattr(serve, "prepare", prepare)
    arguments = ["--model-dir", "/m", "--max_total_token_num=9", "--trust_remote_code", "--", "--log-verbose", "1"]
    assert CliRunner().invoke(serve.command, arguments).exit_code == 2
    assert seen[0] == {"model_dir": "/m", "max_total_token_num": "9", "trust_remote_code": "true"}
    assert seen[3] == ("--log-verbose", "1")


def test_command_line_over_environment_over_config_pbtxt(settings: dict[str, str], repository: Path) -> None:
    (repository / "generation" / "config.pbtxt").write_text(
        "".join(
            f'parameters {{ key: "{key}", value: {{ string_value: "{value}" }} }}\n'
            for key, value in {"max_queue_size": 5, "tokenizer_mode": "slow", "running_max_req_size": 7}.items()
        )
    )
    environment = {**ENVIRONMENT, "LIGHTLLM_RUNNING_MAX_REQ_SIZE": "8", "LIGHTLLM_MAX_QUEUE_SIZE": "6"}
    # A value that is the default must win as well.
    given = {**settings, "max_queue_size": "10000", "tokenizer_mode": "auto"}
    launch = serve.prepare(given, environment, repository)
    assert launch.config.max_queue_size == 10000
    assert launch.config.running_max_req_size == 8
    assert launch.config.tokenizer_mode == "auto"
    # The models read the same two sources again, so they come to the same settings.
    again = EngineConfig.build(serve.repository_parameters(repository), launch.environment)
    assert (again.max_queue_size, again.running_max_req_size, again.tokenizer_mode) == (10000, 8, "auto")


def test_the_server_gets_repository_addresses_and_ports_and_the_user_s_own_last(
    settings: dict[str, str], repository: Path
) -> None:
    launch = serve.prepare(settings, ENVIRONMENT, repository, ["--log-info=true"])
    http_port, grpc_port, metrics_port = (settings[name] for name in ("http_port", "grpc_port", "metrics_port"))
    assert launch.argv[:2] == ["some", "tritonserver"]
    assert {
        f"--model-repository={repository}", "--http-address=127.0.0.1", "--grpc-address=127.0.0.1",
        "--metrics-address=127.0.0.1", f"--http-port={http_port}", f"--grpc-port={grpc_port}",
        f"--metrics-port={metrics_port}",
    } < set(launch.argv)  # fmt: skip
    assert launch.argv.index("--log-info=false") < launch.argv.index("--log-info=true")
    assert "--log-info=false" not in serve.prepare(settings, ENVIRONMENT, repository, verbose=True).argv
    assert launch.environment["LIGHTLLM_WORKER_PYTHON"] == sys.executable
    assert launch.environment["LIGHTLLM_MODEL_DIR"] == settings["model_dir"]


def closed_apis(argv: list[str]) -> list[str]:
    """What is closed over HTTP and what over gRPC, as tritonserver reads it from its options."""
    values = dict(argument.split("=", 1) for argument in argv if argument.startswith("--") and "=" in argument)
    options = ("--http-restricted-api", "--grpc-restricted-protocol")
    return [values.get(option, "").partition(":")[0] for option in options]


def test_administration_apis_are_closed_unless_a_setting_opens_them(settings: dict[str, str], repository: Path) -> None:
    def closed(open_apis: str) -> list[str]:
        given = {**settings, "open_apis": open_apis}
        return closed_apis(serve.prepare(given, ENVIRONMENT, repository).argv)

    assert closed("") == ["logging,model-repository,shared-memory,trace"] * 2
    assert closed("shared-memory,trace") == ["logging,model-repository"] * 2
    assert closed("logging,model-repository,shared-memory,trace") == ["", ""]


@pytest.mark.parametrize(
    ("host", "address"),
    [("127.0.0.1", "127.0.0.1:1"), ("0.0.0.0", "127.0.0.1:1"), ("::", "[::1]:1"), ("here", "here:1")],
)
def test_clients_on_this_machine_are_told_an_address_that_they_can_reach(host: str, address: str) -> None:
    assert serve.Launch(EngineConfig(host=host), Path(), [], {}).address(1) == address


def error_of(arguments: list[str], environment: dict[str, str] | None = None) -> str:
    result = CliRunner().invoke(serve.command, arguments, env=environment)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    return result.stderr


def options(settings: dict[str, str]) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items()]


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"tp": "0"}, "error: tp is 0; allowed: a whole number ≥ 1"),
        ({"max_queue_size": "many"}, "error: max_queue_size is 'many'; allowed: a whole number ≥ 1"),
        ({"model_dir": "/nowhere"}, "error: /nowhere: there is no such directory"),
        ({"host": "no.such.invalid"}, "error: host is 'no.such.invalid'"),
        ({"host": "192.0.2.1"}, "which cannot be used on 192.0.2.1"),
        ({"grpc_port": "8000", "http_port": "8000"}, "allowed: three ports"),
        ({"model_repository": "/nowhere"}, "--model_repository must name"),
    ],
)
def test_what_is_wrong_is_one_line_and_code_2(settings: dict[str, str], changed: dict[str, str], error: str) -> None:
    assert error in error_of(options({**settings, **changed}))


def test_a_model_that_cannot_be_served_is_told_before_anything_starts(
    settings: dict[str, str], model_dir: Path
) -> None:
    (model_dir / "tokenizer.json").write_text("{")
    assert "tokenizer.json" in error_of(options(settings))
    (model_dir / "config.json").write_text(json.dumps({**MODEL, "architectures": ["NoSuchModel"]}))
    assert "'NoSuchModel' is not known" in error_of(options(settings))


def test_an_occupied_port_is_told_before_anything_starts(settings: dict[str, str]) -> None:
    with socket.socket() as occupant:
        occupant.bind(("127.0.0.1", 0))
        occupant.listen()
        port = occupant.getsockname()[1]
        message = error_of(options({**settings, "grpc_port": str(port)}))
    assert f"grpc_port is {port}" in message
    assert "in use" in message


def test_unknown_variables_and_contradicting_options_are_refused(settings: dict[str, str]) -> None:
    assert "LIGHTLLM_NO_SUCH in the environment is not a setting" in error_of([], {"LIGHTLLM_NO_SUCH": "1"})
    assert "give --http_port" in error_of([*options(settings), "--", "--http-port=9"])
    assert "models/llama is not an option" in error_of([*options(settings), "models/llama"])


# The command as a whole


@pytest.fixture
def launch_command(settings: dict[str, str], repository: Path, tmp_path: Path) -> Iterator[Any]:
    """Starts the command with the stand-in; probes follow each other quickly."""
    script = tmp_path / "fake_tritonserver.py"
    script.write_text(FAKE_TRITONSERVER)
    program = (
        "from lightllm_backend import serve; from lightllm_backend.launch import health; "
        "health.PROBE_SECONDS = 0.2; serve.command()"
    )
    command = [sys.executable, "-c", program, *options({**settings, "model_repository": str(repository)})]
    environment = {**os.environ, "LIGHTLLM_TRITONSERVER": f"{sys.executable} {script} {tmp_path}"}
    environment["PYTHONPATH"] = str(ROOT)
    environment["COLUMNS"] = "200"
    started: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        started.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment))
        return started[0]

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def read_until(process: subprocess.Popen[str], text: str) -> str:
    assert process.stderr is not None
    lines = ""
    for line in process.stderr:
        lines += line
        if text in line:
            return lines
    pytest.fail(f"{text!r} was not said:\n{lines}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_says_what_was_chosen_and_ends_as_the_server_ends(
    launch_command: Any, settings: dict[str, str], tmp_path: Path, number: signal.Signals
) -> None:
    process = launch_command()
    said = read_until(process, "curl")
    for fact in ("some/model", "cuda:0, bfloat16", "123,456 tokens, 3.00 GiB", settings["grpc_port"]):
        assert fact in said
    lengths = "at most 2,048 prompt tokens (max_req_input_len), 8,192 in all (the model's limit)"
    assert lengths in " ".join(said.replace("│", " ").split())
    assert f"curl 127.0.0.1:{settings['http_port']}/v2/models/lightllm/generate -d" in said
    assert (tmp_path / "model_dir").read_text() == settings["model_dir"]
    assert poll((tmp_path / "probed").exists)
    process.send_signal(number)
    # The stand-in ends with 7 on SIGTERM; SIGINT is Python's KeyboardInterrupt.
    assert process.wait(20) == (7 if number == signal.SIGTERM else 130)


def test_a_server_that_cannot_start_gives_its_exit_code(launch_command: Any, tmp_path: Path) -> None:
    (tmp_path / "fails").touch()
    process = launch_command()
    said = read_until(process, "error: tritonserver ended before it was ready")
    assert "the server's own reason" in said
    assert process.wait(20) == 9


def test_a_server_that_fails_its_probes_is_stopped(launch_command: Any, tmp_path: Path) -> None:
    process = launch_command()
    read_until(process, "curl")
    (tmp_path / "broken").touch()
    assert "lightllm answers with status 400: a stub is gone" in read_until(process, "error: the server does not work")
    assert process.wait(20) == 1


def test_a_killed_command_leaves_no_server_behind(
    launch_command: Any, settings: dict[str, str], tmp_path: Path
) -> None:
    process = launch_command()
    read_until(process, "curl")
    process.kill()

    def is_gone() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", int(settings["http_port"]))) != 0

    assert poll(is_gone)


def test_processes_that_the_server_leaves_behind_are_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(serve, "GROUP_SECONDS", 0.2)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    file = tmp_path / "pid"
    leave = f"open({str(file)!r}, 'w').write(str(subprocess.Popen(['sleep', '99']).pid))"
    code = f"import os, subprocess; {leave}; os._exit(3)"
    server = serve.Server(serve.Launch(EngineConfig(), Path(), [sys.executable, "-c", code], dict(os.environ)))
    assert server.exit_code() == 3

    def is_gone() -> bool:
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(int(file.read_text())).status() == psutil.STATUS_ZOMBIE
        return True

    assert poll(is_gone)


def test_what_the_server_writes_is_private(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    file = tmp_path / "trace"
    code = f"open({str(file)!r}, 'w')"
    serve.Server(serve.Launch(EngineConfig(), Path(), [sys.executable, "-c", code], dict(os.environ))).exit_code()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
