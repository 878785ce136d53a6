# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C, which reaches all processes of a terminal's foreground group, ends the worker command without a traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.free_ports import free_ports
from tests.polling import poll
from tests.runner.engine_harness import save_random_llama
from tests.worker.process_harness import configuration, further_host, kill_all

ROOT = Path(__file__).parents[2]


def test_while_it_imports(tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    command = [sys.executable, "-m", "lightllm_backend.worker"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, b"")


def test_while_its_rank_waits_for_host_0(tmp_path: Path) -> None:
    model, log = tmp_path / "model", tmp_path / "log"
    save_random_llama(model)
    config = configuration(
        model, 2, nnodes=2, master_addr="127.0.0.1", master_port=free_ports(1)[0], load_format="dummy"
    )
    command = further_host(config, log, ["setsid"])
    try:
        assert poll(lambda: "waiting for host 0" in log.read_text()), log.read_text()
        os.killpg(command.pid, signal.SIGINT)
        assert command.wait(60) == 0
    finally:
        if command.poll() is None:
            kill_all(command)
    assert "Traceback" not in log.read_text(), log.read_text()
