# SPDX-License-Identifier: Apache-2.0
"""A process of the front beside a real server."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import tokenizers

from lightllm_backend.launch.embedded_model import embedded_model_directory
from tests.e2e.server import TritonServer, engine_environment, get
from tests.free_ports import free_ports
from tests.polling import poll

START_SECONDS = 120.0


def encode(text: str) -> list[int]:
    """The ids of a text in the embedded model's vocabulary."""
    tokenizer = tokenizers.Tokenizer.from_file(str(embedded_model_directory() / "tokenizer.json"))
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


class FrontProcess:
    """Owns the process from construction to `stop`."""

    def __init__(self, server: TritonServer, log: Path, **settings: object) -> None:
        [self.port] = free_ports(1)
        self.url = f"http://127.0.0.1:{self.port}"
        chosen: dict[str, object] = {
            "model_dir": embedded_model_directory(),
            "grpc_port": server.grpc_port,
            "metrics_port": server.metrics_port,
            "openai_port": self.port,
            **settings,
        }
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "lightllm_backend.front.main"],
                env=engine_environment(chosen),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self.log = log

    def wait_ready(self) -> FrontProcess:
        assert poll(lambda: self.process.poll() is not None or self._answers(), START_SECONDS)
        assert self.process.poll() is None, self.log.read_text(errors="replace")
        return self

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)

    def _answers(self) -> bool:
        try:
            return get(self.port, "/v1/models")[0] == 200
        except OSError:
            return False
