# SPDX-License-Identifier: Apache-2.0
"""The demo obeys signals without a word, with a stand-in for the launch command."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightllm_backend.launch.guard import identity
from tests.polling import poll

EXAMPLES = Path(__file__).parents[1] / "examples"

# Writes down how many signals it has got. It ends with the fourth, so the demo has to pass on a second one of its own.
LAUNCH_COMMAND = """
import os, signal, sys
from pathlib import Path
numbers = {signal.SIGTERM, signal.SIGINT}
signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
Path(sys.argv[1], "pid").write_text(str(os.getpid()))
for count in range(1, 5):
    if signal.sigtimedwait(numbers, 60) is None:
        break
    Path(sys.argv[1], "signals").write_text(str(count))
"""
DEMO = f"""
import os, signal, subprocess, sys, time
from pathlib import Path
import demo
def start_server(ports):
    server = subprocess.Popen([sys.executable, "-c", {LAUNCH_COMMAND!r}, sys.argv[1]])
    while not Path(sys.argv[1], "pid").exists():
        time.sleep(0.01)
    if sys.argv[2] == "early":
        os.kill(os.getpid(), signal.SIGTERM)
    return server
demo.start_server = start_server
sys.exit(demo.main())
"""


class Demo:
    def __init__(self, folder: Path, when: str) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-c", DEMO, str(folder), when],
            cwd=EXAMPLES,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def has_server(self) -> bool:
        pid = self._written("pid")
        return pid != "" and identity(int(pid)) != ""

    def signals(self) -> str:
        """How many signals the launch command has got."""
        return self._written("signals")

    def _written(self, name: str) -> str:
        path = self.folder / name
        return path.read_text() if path.exists() else ""


@pytest.fixture(params=["while it waits", "early"])
def demo(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Demo]:
    """A demo that has got its first signal: while it waits for the server, or before it knows the server."""
    demo = Demo(tmp_path, request.param)
    try:
        assert poll(demo.has_server)
        if request.param != "early":
            demo.process.terminate()
        yield demo
    finally:
        demo.process.kill()
        demo.process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_each_signal_stops_the_launch_command_at_once(demo: Demo, number: signal.Signals) -> None:
    assert poll(lambda: demo.signals() == "2"), "SIGTERM and SIGINT"
    assert demo.process.poll() is None, "it waits for the launch command"
    demo.process.send_signal(number)
    assert demo.process.wait(60) == 130
    assert demo.signals() == "4"
    assert not demo.has_server()
    assert demo.process.communicate()[0] == b""
