# SPDX-License-Identifier: Apache-2.0
"""The launch command: `python -m lightllm_backend.serve --model_dir /models/llama-7B [SETTINGS] [-- FOR TRITONSERVER]`.

Checks the settings and the model directory, runs tritonserver on the model repository, prints a summary and watches the
server. It stops a server that no longer answers real requests and exits with 1, so that a container's restart policy or
systemd starts a fresh one. If the server ends by itself, the command ends with the server's exit code. A wrong setting
gives one line and exit code 2.
"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import FrameType
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from lightllm_backend.config import ENVIRONMENT_PREFIX, PROBE_KEY_VARIABLE, ConfigError, EngineConfig
from lightllm_backend.generation.engine_client import EngineClient
from lightllm_backend.launch import health
from lightllm_backend.launch.closed_apis import closing_options
from lightllm_backend.launch.embedded_model import EmbeddedModelError, embedded_model_directory
from lightllm_backend.launch.health import Health, http_call
from lightllm_backend.messages.engine_messages import EngineInfo
from lightllm_backend.messages.run_directory import engine_address, run_directory_of
from lightllm_backend.messages.vitals import read_vitals
from lightllm_backend.models.errors import ModelError
from lightllm_backend.request import RequestError
from lightllm_backend.text.model_tokenizer import load_tokenizer
from lightllm_backend.text.tokenizer_settings import TokenizerError
from lightllm_backend.triton_server import executable as tritonserver
from lightllm_backend.triton_server.executable import TritonServerError
from lightllm_backend.triton_server.setup import repository_parameters

MODEL_REPOSITORY = Path(__file__).resolve().parents[1] / "model_repository"
PROGRESS_SECONDS = 10.0
STOP_SECONDS = 60.0
# For a server that no longer works: the time to end by itself, and before that the time to inform its clients.
GIVE_UP_SECONDS, TELL_SECONDS = 5.0, 5.0
# For the server's child processes to end after it; workers without a supervisor take some seconds.
GROUP_SECONDS = 10.0
USAGE_ERROR = 2

# tritonserver's options that would contradict a setting, with that setting.
_OWNED_OPTIONS = {
    "--http-address": "host",
    "--http-port": "http_port",
    "--grpc-address": "host",
    "--grpc-port": "grpc_port",
    "--metrics-address": "host",
    "--metrics-port": "metrics_port",
}
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


class ServeError(Exception):
    """The user must change something before the server can be started; the message says what."""


@dataclass(frozen=True)
class Launch:
    """Everything needed to start the server."""

    config: EngineConfig
    model_dir: Path
    argv: list[str]
    environment: dict[str, str]

    def address(self, port: int) -> str:
        """Return the address of a port for a client on this machine, also if the server listens on all interfaces."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.config.host, self.config.host)
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def prepare(
    settings: Mapping[str, str],
    environment: Mapping[str, str],
    repository: Path,
    arguments: Sequence[str] = (),
    verbose: bool = False,
) -> Launch:
    """Check the settings, the model directory and the ports, without the weights; raise an error of one line.

    settings: the command line's settings as text. arguments: the user's own arguments for tritonserver.
    """
    variables = {ENVIRONMENT_PREFIX + name.upper(): value for name, value in settings.items()}
    merged = {**environment, **variables}
    config = EngineConfig.build(repository_parameters(repository), merged)
    if arguments and not arguments[0].startswith("-"):
        raise ServeError(f"{arguments[0]} is not an option; settings are given as --name value")
    for argument in arguments:
        if owner := _OWNED_OPTIONS.get(argument.partition("=")[0]):
            raise ServeError(f"{argument} after --: this is decided by the setting {owner}; give --{owner}")
    python = config.worker_python or sys.executable
    model_dir = Path(config.model_dir) if config.model_dir else embedded_model_directory(python)
    load_tokenizer(model_dir, config)
    check_ports(config)
    server_arguments = [
        f"--model-repository={repository}",
        *(f"--{service}-address={config.host}" for service in ("http", "grpc", "metrics")),
        f"--http-port={config.http_port}",
        f"--grpc-port={config.grpc_port}",
        f"--metrics-port={config.metrics_port}",
        *closing_options(config.open_apis or ()),
        *([] if verbose else ["--log-info=false", "--log-warning=false"]),
        *arguments,  # the last value of a repeated option wins
    ]
    argv, server_environment = tritonserver.command(
        server_arguments,
        {**merged, f"{ENVIRONMENT_PREFIX}WORKER_PYTHON": python, PROBE_KEY_VARIABLE: secrets.token_hex(16)},
    )
    return Launch(config, model_dir, argv, server_environment)


def check_ports(config: EngineConfig) -> None:
    """Check the ports now: the server would notice an occupied port only minutes later, with the model loaded."""
    ports = {name: getattr(config, name) for name in ("http_port", "grpc_port", "metrics_port")}
    if len(set(ports.values())) < len(ports):
        raise ServeError(f"{', '.join(f'{name} is {port}' for name, port in ports.items())}; allowed: three ports")
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


def _end_with_parent() -> None:
    """Run in the child: make the kernel end the server if this command dies."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class Server:
    """The tritonserver process, in a group of its own: Ctrl-C reaches it once, through us, and never its workers."""

    def __init__(self, launch: Launch) -> None:
        self.stopping = False
        self._process = subprocess.Popen(
            launch.argv,
            env=launch.environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            umask=0o077,  # files and sockets of all processes are the server's user's alone
            preexec_fn=_end_with_parent,  # noqa: PLW1509 (no other thread runs yet)
        )
        self._waiter = threading.Thread(target=self._process.wait, name="tritonserver", daemon=True)
        self._waiter.start()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._forward)

    @property
    def pid(self) -> int:
        return self._process.pid

    def ended_within(self, seconds: float) -> bool:
        self._waiter.join(seconds)
        return not self._waiter.is_alive()

    def stop(self, seconds: float = STOP_SECONDS) -> None:
        """End the server; kill its whole group if it does not end in time."""
        self._process.terminate()
        if not self.ended_within(seconds):
            os.killpg(self.pid, signal.SIGKILL)
        self.exit_code()

    def exit_code(self) -> int:
        """Wait for all processes of the group; return the exit code as a shell reports it."""
        self._waiter.join()
        self._end_group()
        code = self._process.returncode
        return 128 - code if code < 0 else code

    def _end_group(self) -> None:
        """Kill the rest of the group: a stub whose server ends during loading may wait for ever."""
        end = time.monotonic() + GROUP_SECONDS
        with contextlib.suppress(ProcessLookupError):
            while time.monotonic() < end:
                os.killpg(self.pid, 0)  # raises an error if no process is left
                time.sleep(0.05)
            os.killpg(self.pid, signal.SIGKILL)

    def _forward(self, number: int, _frame: FrameType | None) -> None:
        self.stopping = True
        self._process.send_signal(number)


def wait_until_ready(server: Server, address: str, tell: Callable[[str], None]) -> float | None:
    """Return the seconds until the server is ready, or None if it ended first."""
    started = told = time.monotonic()
    while not server.ended_within(0.2):
        now = time.monotonic()
        with contextlib.suppress(OSError):
            if http_call(address, "GET", "/v2/health/ready", None, health.PROBE_SECONDS)[0] == http.client.OK:
                return now - started
        if now - told >= PROGRESS_SECONDS and not server.stopping:
            told = now
            tell(f"loading … {now - started:.0f} s")
    return None


def serve(launch: Launch, console: Console) -> int:
    """Run the server until it ends; return the exit code."""
    address = launch.address(launch.config.http_port)

    def tell(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    tell(f"starting tritonserver with {launch.model_dir}")
    server = Server(launch)
    seconds = wait_until_ready(server, address, tell)
    if seconds is None:
        if not server.stopping:
            tell("error: tritonserver ended before it was ready; the lines above say why")
        return server.exit_code() or int(not server.stopping)

    directory = run_directory_of(server.pid)
    engine = EngineClient(engine_address(directory))
    watch = Health(address, server.pid, directory, engine, seconds, launch.environment[PROBE_KEY_VARIABLE])
    try:
        console.print(summary(launch, engine.wait_ready(health.PROBE_SECONDS)))
        tell(f"ready after {seconds:.1f} s; ask it something:\n{first_call(address)}")
    except RequestError as error:
        tell(f"warning: the server is ready, its engine is not: {error}")
    while not server.ended_within(health.PROBE_SECONDS):
        failure = None if server.stopping else watch.check()
        if failure is None or server.stopping:
            continue
        if failure.workers:
            tell(f"error: the engine is replaced: {failure.reason}")
            for pid in failure.workers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            continue
        tell(f"error: the server does not work any more and is stopped: {failure.reason}")
        end_requests(engine, directory, failure.reason)
        server.stop(GIVE_UP_SECONDS)
        return 1
    code = server.exit_code()
    if code and not server.stopping:
        tell(f"error: tritonserver ended by itself, with exit code {code}")
    return code


def end_requests(engine: EngineClient, directory: Path, reason: str) -> None:
    """End every request with an error, as far as the server still can, and wait until the answers are sent."""
    engine.close_engine(f"the server is stopped: {reason}")
    end = time.monotonic() + TELL_SECONDS
    delivered, now = -1, 0
    while now != delivered and time.monotonic() < end:
        time.sleep(TELL_SECONDS / 10)
        delivered, now = now, sum(reading.taken for reading in read_vitals(directory) if reading.role == "detokenizer")


def summary(launch: Launch, info: EngineInfo) -> Table:
    """Make the table of the settings in effect and the sizes that the engine determined."""
    config = launch.config
    rows = {
        "model": info.model + (" (random weights)" if config.load_format == "dummy" else ""),
        "computed on": f"{info.device}, {info.dtype}, {config.tp} rank{'s' * (config.tp > 1)}",
        "KV pool": f"{info.pool_tokens:,} tokens, {info.memory['KV pool'] / 2**30:.2f} GiB",
        "a request": str(info.lengths),
        "at once": f"at most {config.running_max_req_size:,} requests, {config.max_queue_size:,} more in the queue",
        "HTTP": f"http://{launch.address(config.http_port)}/v2/models/lightllm",
        "gRPC": launch.address(config.grpc_port),
        "metrics": f"http://{launch.address(config.metrics_port)}/metrics",
    }
    table = Table(show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def first_call(address: str) -> str:
    body = json.dumps({"text_input": "The capital of Japan is", "max_tokens": 16})
    return f"curl {address}/v2/models/lightllm/generate -d '{body}'"


def setting_options() -> list[click.Parameter]:
    """Make a command-line option for each setting. Values stay text, since config.py parses those of every source."""
    options: list[click.Parameter] = []
    for setting in fields(EngineConfig):
        default, allowed = setting.default, setting.metadata["allowed"]
        notes = [f"allowed: {allowed}"] if allowed else []
        notes += [] if default is None else [f"default: {str(default).lower() if default is False else default}"]
        flag: dict[str, Any] = {"is_flag": False, "flag_value": "true"} if isinstance(default, bool) else {}
        text = setting.metadata["help"] + (f" [{'; '.join(notes)}]" if notes else "")
        options.append(click.Option([f"--{setting.name}"], type=str, metavar="VALUE", help=text, **flag))
    options.append(
        click.Option(
            ["--model_repository"],
            default=str(MODEL_REPOSITORY),
            show_default=True,
            metavar="PATH",
            help="the folder with LightLLM's models for Triton server",
        )
    )
    options.append(click.Option(["--verbose"], is_flag=True, help="show tritonserver's own information as well"))
    options.append(click.Argument(["tritonserver_arguments"], nargs=-1, type=click.UNPROCESSED))
    return options


def run(model_repository: str, verbose: bool, tritonserver_arguments: tuple[str, ...], **settings: str | None) -> None:
    """Serve a model with LightLLM on Triton server.

    Every setting may also come from the environment as LIGHTLLM_<NAME>; names may have dashes instead of underscores.
    tritonserver gets the arguments after -- as they are.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    try:
        launch = prepare(given, os.environ, Path(model_repository).resolve(), tritonserver_arguments, verbose)
    except (ConfigError, EmbeddedModelError, ModelError, ServeError, TokenizerError, TritonServerError) as error:
        click.echo(f"error: {' '.join(str(error).split())}", err=True)
        sys.exit(USAGE_ERROR)
    sys.exit(serve(launch, Console(stderr=True)))


command = click.Command(
    "serve",
    callback=run,
    params=setting_options(),
    help=run.__doc__,
    context_settings={"token_normalize_func": lambda name: name.replace("-", "_"), "max_content_width": 120},
)

if __name__ == "__main__":
    command(prog_name="python -m lightllm_backend.serve")
