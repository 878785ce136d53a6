# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C, which reaches all processes of a terminal's foreground group, ends the worker command without a traceback."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from tests.free_ports import free_ports
from tests.polling import poll
from tests.runner.engine_harness import save_random_llama
from tests.worker.process_harness import configuration, further_host, kill_all


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
