# SPDX-License-Identifier: Apache-2.0
"""Fronts: the processes of the front, which the launch command starts, replaces and stops. No torch."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from lightllm_backend.config import API_KEY_VARIABLE, ENVIRONMENT_PREFIX, ConfigError, EngineConfig
from lightllm_backend.environment import package_environment

COMMAND = (sys.executable, "-m", "lightllm_backend.front.main")  # and the descriptor of the socket
BACKLOG = 4096  # connections that wait for a process; the system may allow fewer
FIRST_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 0.5, 30.0  # before a process is replaced; doubles with each that ends soon
STEADY_SECONDS = 60.0  # a process that has lived for so long did not end soon
# Bytes of a connection in the kernel, which doubles them. Left to itself the kernel takes 4 MiB for a client that does
# not read, and the front computes megabytes of events for it before the engine is held back.
SEND_BUFFER = 1 << 17
USAGE_ERROR = 2  # of a process that cannot serve these settings, and never will


class Fronts:
    """All processes of the front. They share one socket, which stays open while a dead process is replaced.

    A process ends when its standard input does, so none outlives the launch command.
    """

    def __init__(self, config: EngineConfig, environment: Mapping[str, str], say: Callable[[str], None]) -> None:
        """environment: from `front_environment`. Raise OSError if the port cannot be used."""
        assert config.openai_port is not None
        self._say = say
        self._socket = listening_socket(config.host, config.openai_port, config.unread_timeout_s)
        self._environment = environment
        self._stopping = threading.Event()
        self._lock = threading.Lock()  # guards the list, and that nothing is started once `stop` has begun
        self._processes: list[subprocess.Popen[bytes]] = []
        self._threads = [
            threading.Thread(target=self._keep, name=f"front-{number}", daemon=True)
            for number in range(config.front_processes)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self, seconds: float) -> None:
        """Take no more connections and let the processes send what they have begun; kill them after `seconds`."""
        self._stopping.set()
        with self._lock:
            processes = list(self._processes)
            self._socket.close()
        for process in processes:
            process.terminate()
        end = time.monotonic() + seconds
        for process in processes:
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for thread in self._threads:
            thread.join()

    def _keep(self) -> None:
        """Run one process after the other."""
        pause = FIRST_PAUSE_SECONDS
        while (process := self._start()) is not None:
            started = time.monotonic()
            code = process.wait()
            with self._lock:
                self._processes.remove(process)
            if self._stopping.is_set():
                return
            if code == USAGE_ERROR:
                self._say("error: the front cannot serve these settings; the line above says why")
                return
            pause = FIRST_PAUSE_SECONDS if time.monotonic() - started >= STEADY_SECONDS else pause
            self._say(f"error: a process of the front has ended, with exit code {code}; another starts in {pause:g} s")
            if self._stopping.wait(pause):
                return
            pause = min(2 * pause, MAX_PAUSE_SECONDS)

    def _start(self) -> subprocess.Popen[bytes] | None:
        with self._lock:
            if self._stopping.is_set():
                return None
            descriptor = self._socket.fileno()
            process = subprocess.Popen(
                [*COMMAND, str(descriptor)],
                env=self._environment,
                stdin=subprocess.PIPE,
                pass_fds=[descriptor],
                start_new_session=True,  # Ctrl-C reaches the launch command alone
            )
            self._processes.append(process)
            return process


def listening_socket(host: str, port: int, unread_seconds: float) -> socket.socket:
    """Listen at an address; connections whose clients take nothing of what is sent end after `unread_seconds`."""
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind)
    with contextlib.ExitStack() as on_error:
        on_error.callback(listener.close)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(1e3 * unread_seconds))
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)  # accepted connections inherit it
        listener.bind(address)
        listener.listen(BACKLOG)
        on_error.pop_all()
    return listener


def front_environment(config: EngineConfig, model_dir: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """Make the environment of a process of the front: the settings in effect, and of secrets the API keys alone."""
    kept = {name: value for name, value in package_environment(environment).items() if not _is_ours(name)}
    keys = {API_KEY_VARIABLE: environment[API_KEY_VARIABLE]} if API_KEY_VARIABLE in environment else {}
    return {**kept, **keys, **config.environment(), f"{ENVIRONMENT_PREFIX}MODEL_DIR": str(model_dir)}


def check_front(config: EngineConfig) -> None:
    """Raise ConfigError for a file of API keys that cannot be read, before anything starts."""
    if config.openai_port is not None and config.api_key_file is not None:
        try:
            Path(config.api_key_file).read_bytes()
        except OSError as error:
            raise ConfigError(
                f"api_key_file is {config.api_key_file!r} ({error.strerror}); allowed: a file that can be read"
            ) from None


def _is_ours(name: str) -> bool:
    return name.startswith(ENVIRONMENT_PREFIX)
