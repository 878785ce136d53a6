# SPDX-License-Identifier: Apache-2.0
"""The process that checks a checkpoint ends with the command that has started it, and then says nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from lightllm_backend.launch.guard import identity
from tests.polling import poll

ROOT = Path(__file__).resolve().parents[2]
MODULE = "lightllm_backend.models.dry_load"
PROGRAM = """
import signal, sys
from pathlib import Path
from lightllm_backend.config import EngineConfig
from lightllm_backend.launch.checkpoint import check_checkpoint
signal.signal(signal.SIGINT, signal.SIG_DFL)
check_checkpoint(Path(sys.argv[1]), EngineConfig(model_dir=sys.argv[1]))
"""


@contextmanager
def checking(model_dir: Path, errors: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A command that checks this model, in a session of its own."""
    with errors.open("wb") as log:
        command = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(model_dir)], stderr=log, cwd=ROOT, start_new_session=True
        )
    try:
        yield command
    finally:
        command.kill()
        command.wait()


def checker_of(command: subprocess.Popen[bytes]) -> psutil.Process | None:
    for child in psutil.Process(command.pid).children():
        if MODULE in child.cmdline():
            return child
    return None


def imports_torch(process: psutil.Process) -> bool:
    return any("libtorch" in region.path for region in process.memory_maps())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_it_is_killed_with_the_command(model_dir: Path, tmp_path: Path, number: signal.Signals) -> None:
    with checking(model_dir, tmp_path / "errors") as command:
        assert poll(lambda: checker_of(command))
        checker = checker_of(command)
        assert checker is not None
        assert poll(lambda: imports_torch(checker))
        # As a terminal's foreground group gets Ctrl-C: Python itself would print a traceback while it starts.
        assert os.getpgid(checker.pid) != os.getpgid(command.pid)
        checker.suspend()  # so that it cannot end by itself
        process = identity(checker.pid)
        try:
            command.send_signal(number)
            assert command.wait() == -number
            assert poll(lambda: not identity(checker.pid), 20)
        finally:
            if process and identity(checker.pid) == process:
                checker.kill()
    assert (tmp_path / "errors").read_text() == ""


def test_it_says_nothing_if_the_command_was_dead_before_it_began(model_dir: Path) -> None:
    (model_dir / "config.json").write_text("{}")
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", MODULE, str(model_dir), "1", "auto", "auto"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")
