# SPDX-License-Identifier: Apache-2.0
"""The command of further hosts: `python -m lightllm_backend.worker --nnodes 2 --node_rank 1 --master_addr HOST_0 …`.

It runs this host's ranks of an engine whose server runs on host 0, and takes the same settings as the launch command.
It waits for host 0, and whenever the engine ends, for whatever reason, it starts its ranks again, which wait for the
next one. SIGTERM and SIGINT end it. Exit codes: 0 for a signal, 2 for a wrong setting or a broken
model directory, told in one line. A signal that comes before its ranks are started ends it by that signal.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there are ranks to end: no traceback of an import

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import click

from lightllm_backend import logs
from lightllm_backend.command_line import CONTEXT_SETTINGS, USAGE_ERROR, setting_options
from lightllm_backend.config import ENVIRONMENT_PREFIX, ConfigError, EngineConfig
from lightllm_backend.generation.supervisor import EngineSupervisor
from lightllm_backend.launch.checkpoint import check_checkpoint
from lightllm_backend.launch.embedded_model import EmbeddedModelError, embedded_model_directory
from lightllm_backend.messages.run_directory import (
    RunDirectoryError,
    engine_address,
    remove_run_directory,
    remove_stale_run_directories,
    run_directory_of,
)
from lightllm_backend.models.errors import ModelError
from lightllm_backend.models.model_config import ModelConfig
from lightllm_backend.triton_server.setup import repository_parameters


def run(model_repository: str, **settings: str | None) -> NoReturn:
    """Run this host's ranks of an engine that spans several hosts; host 0 runs the server.

    Every setting may also come from the environment as LIGHTLLM_<NAME>; names may have dashes instead of underscores.
    Settings that only the server reads are accepted and ignored, so that all hosts may be given the same ones.
    """
    logs.set_up("worker")
    given = {ENVIRONMENT_PREFIX + name.upper(): value for name, value in settings.items() if value is not None}
    try:
        config = EngineConfig.build(repository_parameters(Path(model_repository)), {**os.environ, **given})
        config.check_host(serves=False)
        model_dir = Path(config.model_dir or embedded_model_directory())
        ModelConfig.from_directory(model_dir).check_ranks(config.tp)
        check_checkpoint(model_dir, config)
        remove_stale_run_directories()
        directory = run_directory_of(os.getpid())
    except (ConfigError, EmbeddedModelError, ModelError, PermissionError, RunDirectoryError) as error:
        click.echo(f"error: {' '.join(str(error).split())}", err=True)
        sys.exit(USAGE_ERROR)
    logs.set_up("worker", config.log_format)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: sys.exit(0))
    config = replace(config, worker_python=config.worker_python or sys.executable)
    try:
        keep_ranks(config, engine_address(directory))
    finally:
        remove_run_directory(directory)
    raise AssertionError("only a signal ends it")


def keep_ranks(config: EngineConfig, address: str) -> None:
    """Run this host's ranks until a signal raises SystemExit."""
    supervisor = EngineSupervisor(config, address)
    try:
        supervisor.keep()
    finally:
        supervisor.stop()


command = click.Command(
    "worker", callback=run, params=setting_options(), help=run.__doc__, context_settings=CONTEXT_SETTINGS
)

if __name__ == "__main__":
    command(prog_name="python -m lightllm_backend.worker")
