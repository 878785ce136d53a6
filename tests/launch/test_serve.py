# SPDX-License-Identifier: Apache-2.0
"""The launch command: settings and checks, and the supervision of a stand-in for tritonserver."""

import ctypes
import errno
import json
import os
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from lightllm_backend import serve
from lightllm_backend.config import EngineConfig
from lightllm_backend.launch import embedded_model
from lightllm_backend.launch import server as server_module
from lightllm_backend.launch.gpu import NO_DEVICE
from lightllm_backend.launch.guard import identity
from lightllm_backend.launch.server import Launch, Server
from lightllm_backend.messages.run_directory import run_directory_of
from tests.launch.command_line import MODEL, options
from tests.polling import poll

ROOT = Path(__file__).resolve().parents[2]
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


def test_config_files_are_completed_only_beside_the_models_of_others(
    settings: dict[str, str], repository: Path
) -> None:
    option = "--disable-auto-complete-config"
    assert option in serve.prepare(settings, ENVIRONMENT, ROOT / "model_repository").argv
    assert option not in serve.prepare(settings, ENVIRONMENT, repository, ["--model-repository=/others"]).argv
    (repository / "resnet").mkdir()
    assert option not in serve.prepare(settings, ENVIRONMENT, repository).argv


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


def test_whose_clients_may_load_models_begins_with_all(settings: dict[str, str], repository: Path) -> None:
    def chosen(open_apis: str, *arguments: str) -> list[str]:
        argv = serve.prepare({**settings, "open_apis": open_apis}, ENVIRONMENT, repository, arguments).argv
        return [one for one in argv if one.startswith(("--model-control-mode", "--load-model")) or one == "lightllm"]

    assert chosen("trace") == []
    assert chosen("trace,model-repository") == ["--model-control-mode=explicit", "--load-model=*"]
    only = ["--load-model", "lightllm"]
    assert chosen("model-repository", *only) == ["--model-control-mode=explicit", *only]
    poll = "--model-control-mode=poll"
    assert chosen("model-repository", poll) == [poll]


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
        ({"tp": "3"}, "error: tp is 3; allowed: 1, 2, since the model has 2 attention heads, 2 KV heads and"),
        ({"restart": "-1"}, "error: restart is -1; allowed: a whole number ≥ 0"),
        ({"shutdown_timeout_s": "-1"}, "error: shutdown_timeout_s is -1.0; allowed: seconds ≥ 0"),
    ],
)
def test_what_is_wrong_is_one_line_and_code_2(settings: dict[str, str], changed: dict[str, str], error: str) -> None:
    assert error in error_of(options({**settings, **changed}))


def test_a_gpu_that_is_not_there_is_told_before_anything_starts(
    settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(cuInit=lambda flags: NO_DEVICE))
    expected = "error: device is 'cuda', but NVIDIA's driver finds no GPU; allowed here: auto | cpu\n"
    assert error_of(options({**settings, "device": "cuda"})) == expected


def test_a_model_that_cannot_be_served_is_told_before_anything_starts(
    settings: dict[str, str], model_dir: Path
) -> None:
    (model_dir / "tokenizer.json").write_text("{")
    assert "tokenizer.json" in error_of(options(settings))
    (model_dir / "config.json").write_text(json.dumps({**MODEL, "architectures": ["NoSuchModel"]}))
    assert "'NoSuchModel' is not known" in error_of(options(settings))


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("model.safetensors", None, "there are no weights; .safetensors or .bin files are needed"),
        ("model.safetensors", "", "model.safetensors: cannot be read: Error while deserializing header"),
        (
            "model.safetensors.index.json",
            '{"weight_map": {"a": "b.safetensors"}}',
            "not there: b.safetensors; download",
        ),
    ],
)
def test_weights_that_cannot_be_read_are_told_before_anything_starts(
    settings: dict[str, str], repository: Path, model_dir: Path, name: str, text: str | None, error: str
) -> None:
    (model_dir / "model.safetensors").unlink()
    if text is not None:
        (model_dir / name).write_text(text)
    assert error in error_of(options({**settings, "load_format": "auto"}))
    serve.prepare(settings, ENVIRONMENT, repository)


def test_weights_that_contradict_config_json_are_told_before_anything_starts(
    settings: dict[str, str], repository: Path, model_dir: Path
) -> None:
    settings["load_format"] = "auto"
    serve.prepare(settings, ENVIRONMENT, repository)
    (model_dir / "config.json").write_text(json.dumps(MODEL | {"intermediate_size": 48}))
    assert error_of(options(settings)) == (
        f"error: {model_dir / 'model.safetensors'}: model.layers.0.mlp.down_proj.weight has the shape [16, 32]; "
        "config.json makes it [16, 48]\n"
    )


@pytest.mark.parametrize("python", ["/bin/false", "/absent"])
def test_a_check_of_the_weights_that_fails_by_itself_leaves_it_to_the_workers(
    settings: dict[str, str], repository: Path, model_dir: Path, python: str
) -> None:
    (model_dir / "config.json").write_text(json.dumps(MODEL | {"intermediate_size": 48}))
    serve.prepare({**settings, "load_format": "auto", "worker_python": python}, ENVIRONMENT, repository)


def test_a_model_that_may_not_be_read_is_told_before_anything_starts(
    settings: dict[str, str], model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exists(path: Path) -> bool:  # root may read everything
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "exists", exists)
    message = error_of(options(settings))
    assert f"model_dir is {model_dir} ({model_dir / 'config.json'}: Permission denied)" in message
    assert f"a directory that user {os.geteuid()} may read" in message


def test_an_occupied_port_is_told_before_anything_starts(settings: dict[str, str]) -> None:
    with socket.socket() as occupant:
        occupant.bind(("127.0.0.1", 0))
        occupant.listen()
        port = occupant.getsockname()[1]
        message = error_of(options({**settings, "grpc_port": str(port)}))
    assert f"grpc_port is {port}" in message
    assert "in use" in message


def test_run_directory_trouble_is_told_before_anything_starts(settings: dict[str, str]) -> None:
    directory = "/tmp/no/such/directory"
    message = error_of(options(settings), {"LIGHTLLM_RUN_DIR": "", "XDG_RUNTIME_DIR": directory})
    assert f"{directory}/lightllm-{os.getuid()} cannot be made: No such file or directory; set" in message


def test_a_full_disk_is_told_before_anything_starts(
    settings: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that must be converted first needs room in the cache."""
    monkeypatch.setattr(embedded_model.shutil, "disk_usage", lambda path: SimpleNamespace(free=100 << 20))
    del settings["model_dir"]
    message = error_of(options(settings), {"LIGHTLLM_CACHE": str(tmp_path)})
    assert "only 100 MB are free; LIGHTLLM_CACHE must name a writable directory with 1 GB of free space" in message


def test_unknown_variables_and_contradicting_options_are_refused(settings: dict[str, str]) -> None:
    assert "LIGHTLLM_NO_SUCH in the environment is not a setting" in error_of([], {"LIGHTLLM_NO_SUCH": "1"})
    assert "give --http_port" in error_of([*options(settings), "--", "--http-port=9"])
    assert "models/llama is not an option" in error_of([*options(settings), "models/llama"])


def test_what_the_server_writes_is_private(tmp_path: Path) -> None:
    file = tmp_path / "trace"
    code = f"open({str(file)!r}, 'w')"
    server = Server(Launch(EngineConfig(), Path(), [sys.executable, "-c", code], dict(os.environ)))
    assert server.end() == 0
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_server_that_ends_at_once_is_cleaned_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As one that lacks a library, which may be dead before it has a guard."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))

    def late(pid: int) -> Path:
        assert poll(lambda: not identity(pid))
        return run_directory_of(pid)

    monkeypatch.setattr(server_module, "run_directory_of", late)
    server = Server(Launch(EngineConfig(), Path(), ["false"], dict(os.environ)))
    assert server.end() == 1
    assert poll(lambda: not server.directory.exists())
    assert capfd.readouterr().err == ""


def test_a_server_is_not_ended_for_the_dead_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As in a container whose processes were all killed, and whose run directory outlives it."""
    monkeypatch.setenv("LIGHTLLM_RUN_DIR", str(tmp_path))
    fields = struct.pack("dqddqq", time.monotonic(), 0, 0.0, 30.0, 0, 0)
    (tmp_path / "detokenizer-4999999.vitals").write_bytes(fields)
    server = Server(Launch(EngineConfig(), Path(), ["sleep", "3"], dict(os.environ)))
    assert server.end() == 0
    assert capfd.readouterr().err == ""


INTERRUPTED = """
import runpy, sys, time
class Slow:
    def find_spec(self, name, *_):
        if name == "{module}":
            print("importing", flush=True)
            time.sleep(60)
sys.meta_path.insert(0, Slow())
{run}
"""


@pytest.mark.parametrize(
    ("run", "module"),
    [
        ("runpy.run_module('lightllm_backend.serve', run_name='__main__')", "click"),
        ("runpy.run_module('lightllm_backend.worker', run_name='__main__')", "click"),
        ("runpy.run_path('examples/demo.py', run_name='__main__')", "lightllm_client"),
    ],
)
def test_ctrl_c_while_modules_are_imported_ends_quietly(run: str, module: str) -> None:
    command = [sys.executable, "-c", INTERRUPTED.format(run=run, module=module)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout
        assert process.stdout.readline() == b"importing\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60) == (b"", b"")
    assert process.returncode == -signal.SIGINT
