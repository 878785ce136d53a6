# SPDX-License-Identifier: Apache-2.0
"""Vitals: what a process publishes, and what others read of one that works, stops, dies or leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from lightllm_backend.messages import vitals as vitals_module
from lightllm_backend.messages.vitals import Reading, Vitals, read_vitals
from tests.polling import poll

PROCESS = """
import sys, time
from pathlib import Path
from lightllm_backend.messages import vitals
vitals.BEAT_SECONDS = 0.02
own = vitals.Vitals(Path(sys.argv[1]), "step")
time.sleep(60)
"""


@pytest.fixture
def process(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another process with vitals in `tmp_path`."""
    started = subprocess.Popen([sys.executable, "-c", PROCESS, str(tmp_path)], cwd=Path(__file__).parents[2])
    assert poll(lambda: read_vitals(tmp_path))
    yield started
    started.kill()
    started.wait()


def only(directory: Path) -> Reading:
    [reading] = read_vitals(directory)
    return reading


def test_a_process_tells_what_it_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vitals_module, "BEAT_SECONDS", 0.01)
    vitals = Vitals(tmp_path, "a-step", patience=7.5, count_open=lambda: 3)
    first = only(tmp_path)
    assert (first.role, first.pid, first.alive, first.stopped, first.taken, first.busy_since, first.patience) == (
        "a-step", os.getpid(), True, False, 0, 0.0, 7.5
    )  # fmt: skip
    assert poll(lambda: only(tmp_path).open == 3)
    assert poll(lambda: only(tmp_path).beat > first.beat)
    before = time.monotonic()
    with vitals.working():
        busy = only(tmp_path)
        assert busy.taken == 1
        assert before <= busy.busy_since <= time.monotonic()
    assert (only(tmp_path).taken, only(tmp_path).busy_since) == (1, 0.0)
    with pytest.raises(ZeroDivisionError), vitals.working():
        _ = 1 // 0
    assert only(tmp_path).busy_since == 0.0, "work that fails has ended"
    vitals.close()
    assert read_vitals(tmp_path) == []


def test_a_stopped_process_beats_no_more(tmp_path: Path, process: subprocess.Popen[bytes]) -> None:
    first = only(tmp_path)
    assert poll(lambda: only(tmp_path).beat > first.beat)
    process.send_signal(signal.SIGSTOP)
    time.sleep(0.1)
    stopped = only(tmp_path)
    time.sleep(0.2)
    assert only(tmp_path).beat == stopped.beat
    assert stopped.alive
    assert stopped.stopped
    process.send_signal(signal.SIGCONT)
    assert poll(lambda: only(tmp_path).beat > stopped.beat)


def test_a_dead_process_is_dead_until_another_takes_its_role(tmp_path: Path, process: subprocess.Popen[bytes]) -> None:
    process.kill()
    assert poll(lambda: not only(tmp_path).alive)  # it is a zombie, since nobody has waited for it
    process.wait()
    assert not only(tmp_path).alive
    other = Vitals(tmp_path, "other")
    assert len(read_vitals(tmp_path)) == 2
    successor = Vitals(tmp_path, "step")
    assert {(reading.role, reading.alive) for reading in read_vitals(tmp_path)} == {("other", True), ("step", True)}
    successor.close()
    other.close()


def test_a_file_that_is_just_being_made_is_no_reading(tmp_path: Path) -> None:
    (tmp_path / "step-1.vitals").touch()
    (tmp_path / "engine").touch()
    assert read_vitals(tmp_path) == []


def test_a_run_directory_that_is_removed_while_it_is_read_has_no_readings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "is_dir", lambda self: True)  # as glob still finds it
    assert read_vitals(tmp_path / "removed") == []


def test_a_process_that_leaves_while_it_is_read_is_not_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vitals = Vitals(tmp_path, "step")

    def leaves(pid: int) -> None:
        vitals.close()

    monkeypatch.setattr(vitals_module, "process_status", leaves)
    assert read_vitals(tmp_path) == []


def test_standstills_are_named(tmp_path: Path) -> None:
    now = time.monotonic()
    good = Reading("a", 1, True, False, now, 0, now - 29, 30.0, 0, 0)
    faults = {
        2: (replace(good, alive=False), "a (process 2) is dead"),
        3: (replace(good, stopped=True), "a (process 3) is stopped"),
        4: (replace(good, beat=now - 11), "a (process 4) has stood still for 11 s"),
        5: (replace(good, busy_since=now - 31), "a (process 5) has been stuck for 31 s"),
    }
    readings = [good, *(replace(reading, pid=pid) for pid, (reading, _) in faults.items())]
    assert vitals_module.standstills(readings, now) == {pid: reason for pid, (_, reason) in faults.items()}
