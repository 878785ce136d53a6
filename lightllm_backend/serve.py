# SPDX-License-Identifier: Apache-2.0
"""The launch command: `python -m lightllm_backend.serve --model_dir /models/llama-7B [SETTINGS] [-- FOR TRITONSERVER]`.

Checks the settings and the model directory, runs tritonserver on the model repository, prints a summary and watches the
server (launch/service.py). A server that fails, or no longer answers real requests, is replaced, up to `restart` times
in a row. SIGTERM and SIGINT let running requests end, and stop the server. Exit codes:

0  stopped by a signal, and every request that ran has ended by itself
1  the server could not be started, or failed too often
2  a wrong setting or a broken model directory, told in one line before anything is started
3  stopped by a signal, and requests were ended with an error, at the limit `shutdown_timeout_s` or by a second signal

A signal that comes before anything is started ends the command by that signal, which a shell reports as 130 or 143.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until Service takes it: no traceback of an import

import os
import secrets
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from lightllm_backend import logs
from lightllm_backend.command_line import CONTEXT_SETTINGS, USAGE_ERROR, setting_options
from lightllm_backend.config import API_KEY_VARIABLE, ENVIRONMENT_PREFIX, PROBE_KEY_VARIABLE, ConfigError, EngineConfig
from lightllm_backend.file_limit import raise_file_limit
from lightllm_backend.front.generation_defaults import read_generation_defaults
from lightllm_backend.launch.checkpoint import check_checkpoint
from lightllm_backend.launch.closed_apis import closing_options, model_control_options
from lightllm_backend.launch.embedded_model import EmbeddedModelError, embedded_model_directory
from lightllm_backend.launch.fronts import check_front, front_environment
from lightllm_backend.launch.gpu import check_gpu
from lightllm_backend.launch.server import Launch
from lightllm_backend.launch.service import Service
from lightllm_backend.launch.trace_options import TraceError, trace_options
from lightllm_backend.messages.run_directory import RunDirectoryError, check_run_directory
from lightllm_backend.models.errors import ModelError
from lightllm_backend.models.model_config import ModelConfig
from lightllm_backend.text.model_tokenizer import load_tokenizer
from lightllm_backend.text.tokenizer_settings import TokenizerError
from lightllm_backend.triton_server import executable as tritonserver
from lightllm_backend.triton_server.executable import TritonServerError
from lightllm_backend.triton_server.setup import repository_parameters

# tritonserver's options that would contradict a setting, with that setting.
_OWNED_OPTIONS = {
    "--http-address": "host",
    "--http-port": "http_port",
    "--grpc-address": "host",
    "--grpc-port": "grpc_port",
    "--metrics-address": "host",
    "--metrics-port": "metrics_port",
}


class ServeError(Exception):
    """The user must change something before the server can be started; the message says what."""


_START_ERRORS = (
    ConfigError,
    EmbeddedModelError,
    ModelError,
    RunDirectoryError,
    ServeError,
    TokenizerError,
    TraceError,
    TritonServerError,
)


def prepare(
    settings: Mapping[str, str],
    environment: Mapping[str, str],
    repository: Path,
    arguments: Sequence[str] = (),
    verbose: bool = False,
) -> Launch:
    """Check the settings, the model directory and the ports; raise an error of one line.

    Of the weights, it reads the files' headers alone.

    settings: the command line's settings as text. arguments: the user's own arguments for tritonserver.
    """
    variables = {ENVIRONMENT_PREFIX + name.upper(): value for name, value in settings.items()}
    merged = {**environment, **variables}
    config = EngineConfig.build(repository_parameters(repository), merged)
    config.check_host(serves=True)
    if arguments and not arguments[0].startswith("-"):
        raise ServeError(f"{arguments[0]} is not an option; settings are given as --name value")
    for argument in arguments:
        if owner := _OWNED_OPTIONS.get(argument.partition("=")[0]):
            raise ServeError(f"{argument} after --: this is decided by the setting {owner}; give --{owner}")
    check_run_directory()
    check_ports(config)
    check_front(config)
    if config.device == "cuda":
        check_gpu()
    python = config.worker_python or sys.executable
    model_dir = Path(config.model_dir) if config.model_dir else embedded_model_directory(python)
    try:
        shape = ModelConfig.from_directory(model_dir)
        shape.check_ranks(config.tp)
        shape.with_weight_dtype(config.weight_dtype, config.head_dtype, config.tp)
        load_tokenizer(model_dir, config)
        check_checkpoint(model_dir, config)
    except PermissionError as error:
        raise ServeError(
            f"model_dir is {model_dir} ({error.filename}: {error.strerror}); allowed: a directory that user"
            f" {os.geteuid()} may read"
        ) from None
    if config.openai_port is not None and config.generation_config == "auto":
        read_generation_defaults(model_dir)
    server_arguments = [
        f"--model-repository={repository}",
        *(f"--{service}-address={config.host}" for service in ("http", "grpc", "metrics")),
        f"--http-port={config.http_port}",
        f"--grpc-port={config.grpc_port}",
        f"--metrics-port={config.metrics_port}",
        *tritonserver.completion_options(repository, arguments),
        *closing_options(config.open_apis or ()),
        *model_control_options(config.open_apis or (), arguments),
        *trace_options(config),
        *([] if verbose else ["--log-info=false", "--log-warning=false"]),
        *arguments,  # the last value of a repeated option wins
    ]
    # Only the front needs its keys.
    without_keys = {name: value for name, value in merged.items() if name != API_KEY_VARIABLE}
    argv, server_environment = tritonserver.command(
        server_arguments,
        {**without_keys, f"{ENVIRONMENT_PREFIX}WORKER_PYTHON": python, PROBE_KEY_VARIABLE: secrets.token_hex(16)},
    )
    front = front_environment(config, model_dir, environment) if config.openai_port is not None else {}
    return Launch(config, model_dir, argv, server_environment, front)


def check_ports(config: EngineConfig) -> None:
    """Check the ports now: the server would notice an occupied port only minutes later, with the model loaded."""
    names = ("http_port", "grpc_port", "metrics_port", "openai_port")
    ports = {name: port for name in names if (port := getattr(config, name)) is not None}
    if len(set(ports.values())) < len(ports):
        given = ", ".join(f"{name} is {port}" for name, port in ports.items())
        raise ServeError(f"{given}; allowed: {'three' if len(ports) == 3 else 'four'} ports")
    for name, port in ports.items():
        try:
            family, kind, _, _, address = socket.getaddrinfo(config.host, port, type=socket.SOCK_STREAM)[0]
        except socket.gaierror as error:
            raise ServeError(
                f"host is {config.host!r} ({error.strerror}); allowed: an address of this machine"
            ) from None
        try:
            with socket.socket(family, kind) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        except OSError as error:
            raise ServeError(
                f"{name} is {port}, which cannot be used on {config.host}: {error.strerror}; allowed: a free port"
            ) from None


def options() -> list[click.Parameter]:
    """The command line: the settings, and what is the launch command's own."""
    return [
        *setting_options(),
        click.Option(["--verbose"], is_flag=True, help="show tritonserver's own information as well"),
        click.Argument(["tritonserver_arguments"], nargs=-1, type=click.UNPROCESSED),
    ]


def run(model_repository: str, verbose: bool, tritonserver_arguments: tuple[str, ...], **settings: str | None) -> None:
    """Serve a model with LightLLM on Triton server.

    Every setting may also come from the environment as LIGHTLLM_<NAME>; names may have dashes instead of underscores.
    tritonserver gets the arguments after -- as they are.
    """
    raise_file_limit()
    given = {name: value for name, value in settings.items() if value is not None}
    try:
        launch = prepare(given, os.environ, Path(model_repository).resolve(), tritonserver_arguments, verbose)
    except _START_ERRORS as error:
        click.echo(f"error: {' '.join(str(error).split())}", err=True)
        sys.exit(USAGE_ERROR)
    logs.choose(launch.config.log_format)
    sys.exit(Service(launch, _say_json if launch.config.log_format == "json" else _say_text).run())


def _say_text(what: str | Table) -> None:
    stamped = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {what}" if isinstance(what, str) else what
    Console(stderr=True).print(stamped, markup=False, highlight=False, soft_wrap=True)


def _say_json(what: str | Table) -> None:
    if isinstance(what, str):
        level, found, line = what.partition(": ")
        known = bool(found) and level in ("error", "warning")
        logs.say("launch", level if known else "info", line if known else what)
    else:
        names, values = (column.cells for column in what.columns)
        logs.say("launch", "info", "the settings in effect", {"settings": dict(zip(names, values, strict=True))})


command = click.Command(
    "serve",
    callback=run,
    params=options(),
    help=run.__doc__,
    context_settings=CONTEXT_SETTINGS,
)

if __name__ == "__main__":
    command(prog_name="python -m lightllm_backend.serve")
