# SPDX-License-Identifier: Apache-2.0
"""How a model starts: its settings, tokenizer, metrics and log. No torch."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightllm_backend import logs
from lightllm_backend.config import ConfigError, EngineConfig
from lightllm_backend.file_limit import raise_file_limit
from lightllm_backend.generation.worker_group import EngineStartError
from lightllm_backend.launch.embedded_model import EmbeddedModelError, embedded_model_directory
from lightllm_backend.launch.guard import keep_guard
from lightllm_backend.lengths import LengthLimits
from lightllm_backend.messages.run_directory import RunDirectoryError, check_run_directory, run_directory, server_pid
from lightllm_backend.messages.vitals import read_vitals, standstills
from lightllm_backend.models.errors import ModelError
from lightllm_backend.request import RequestError
from lightllm_backend.text import model_tokenizer
from lightllm_backend.text.tokenizer import Tokenizer
from lightllm_backend.text.tokenizer_settings import TokenizerError
from lightllm_backend.triton_server.metrics import Metrics
from lightllm_backend.triton_server.telemetry import Telemetry

# Errors of the setting or the model, not of the code: the message says what to change.
_START_ERRORS = (
    ConfigError,
    EmbeddedModelError,
    EngineStartError,
    ModelError,
    RequestError,
    RunDirectoryError,
    TokenizerError,
)

SHARED_MEMORY = "/dev/shm"

log = logging.getLogger("lightllm")


def engine_config(arguments: dict[str, str]) -> EngineConfig:
    """The settings of any of the models: from the generation model's config.pbtxt, its own, and the environment.

    From now on the process logs as they say. arguments: those that Triton server gives to `initialize`.
    """
    parameters = repository_parameters(_model_directory(arguments).parent)
    own = json.loads(arguments["model_config"]).get("parameters", {})
    parameters.update({key: value["string_value"] for key, value in own.items()})
    # A stub's file system encoding is ASCII: other characters are spelled there as os.environ spells them.
    parameters = {key: os.fsdecode(value.encode()) for key, value in parameters.items()}
    config = EngineConfig.build(parameters, os.environ)
    config.check_host(serves=True)
    logs.set_up(arguments["model_name"], config.log_format)
    return config


def repository_parameters(repository: Path) -> dict[str, str]:
    """The settings in the generation model's config.pbtxt. Raises ConfigError if it cannot be read."""
    from google.protobuf import text_format

    path = repository / "generation" / "config.pbtxt"
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such file; --model_repository must name the folder that has LightLLM's")
    try:
        parsed = text_format.Parse(path.read_text(encoding="utf-8"), _empty_model_config())
    except (OSError, UnicodeDecodeError, text_format.ParseError) as error:
        raise ConfigError(f"{path}: {error}") from None
    return {key: value.string_value for key, value in parsed.parameters.items()}


def _empty_model_config() -> Any:
    """The message of a config.pbtxt, from its own file: every model would import gRPC with tritonclient's package."""
    package = importlib.util.find_spec("tritonclient")
    assert package is not None
    assert package.submodule_search_locations is not None
    file = Path(package.submodule_search_locations[0], "grpc", "model_config_pb2.py")
    specification = importlib.util.spec_from_file_location("model_config_pb2", file)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module.ModelConfig()


def load_tokenizer(config: EngineConfig) -> Tokenizer:
    """The tokenizer of the model that the settings name."""
    return model_tokenizer.load_tokenizer(_served_directory(config), config)


def known_lengths(config: EngineConfig) -> LengthLimits:
    """The limits of a request's length, as far as they are known without the engine."""
    return model_tokenizer.known_lengths(_served_directory(config), config)


def served_name(config: EngineConfig) -> str:
    """The name by which clients of the front know the model."""
    name = config.served_model_name or Path(_served_directory(config)).resolve().name
    # A stub's own encoding is ASCII, so a name of other letters has surrogates, which no scraper of metrics can read.
    return os.fsencode(name).decode(errors="replace")


def _served_directory(config: EngineConfig) -> str | Path:
    return config.model_dir or embedded_model_directory(config.worker_python or "python3")


def warn_of_tokens_past_model(tokenizer: Tokenizer) -> None:
    """Log a warning if the tokenizer has tokens that the model has not."""
    warning = model_tokenizer.warning_of_tokens_past_model(tokenizer)
    if warning:
        log.warning(warning)


def make_telemetry(config: EngineConfig, with_engine: bool) -> Telemetry:
    """This process's metrics, log and spans of requests. with_engine: whether it reports the engine's state."""
    import triton_python_backend_utils as pb_utils  # only a stub has it

    metrics = Metrics(pb_utils, with_engine, lambda: _workers_work(run_directory()))
    return Telemetry(metrics, config, served_name(config))


def _workers_work(directory: Path) -> bool:
    workers = [reading for reading in read_vitals(directory) if reading.is_worker]
    return not standstills(workers, time.monotonic()) and not any(worker.closing for worker in workers)


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """Surrounds a model's start: sets up the log and the guard, and gives the server an error as one readable line.

    Python's log goes to the server's standard error, among the server's own lines.
    """
    hide_shared_memory()
    if isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr.reconfigure(encoding="utf-8", errors="surrogateescape")  # ASCII inside a stub
    logs.set_up("model")
    try:
        raise_file_limit()
        # A stub has the packages of the first python3 on PATH.
        check_run_directory()
        keep_guard(server_pid(), run_directory(), "python3")
        yield
    except Exception as error:
        known = isinstance(error, _START_ERRORS)
        if not known:
            log.exception("the model cannot be loaded")
        # The stub cannot pass on a text that is not UTF-8.
        raise RuntimeError(readable(str(error) if known else f"{type(error).__name__}: {error}")) from None


def hide_shared_memory() -> None:
    """Make this process's shared memory private to its user, before it holds prompts and answers.

    The Python backend gives every user the right to read it (0644), whatever the umask says.
    """
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        _, separator, name = line.partition(f" {SHARED_MEMORY}/")
        if separator:
            with contextlib.suppress(OSError):  # removed, or another user's
                os.chmod(f"{SHARED_MEMORY}/{name}", 0o600)  # noqa: PTH101 (a name from inside a stub, see engine_config)


def readable(text: str) -> str:
    """The text in characters that UTF-8 can spell, which paths inside a stub are not (see `engine_config`)."""
    try:
        return text.encode(errors="surrogateescape").decode(errors="replace")
    except UnicodeEncodeError:  # a lone surrogate that stands for no byte
        return text.encode(errors="replace").decode()


def _model_directory(arguments: dict[str, str]) -> Path:
    """The model's directory. In some modes Triton server names a file or folder in it instead."""
    path = Path(arguments["model_repository"])
    return path if (path / "config.pbtxt").exists() else path.parent
