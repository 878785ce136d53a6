# SPDX-License-Identifier: Apache-2.0
"""The guard, with stand-ins for tritonserver, its stubs and a worker that a test kills and stops."""

from __future__ import annotations

import fcntl
import os
import signal
import struct
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from lightllm_backend.environment import STUB
from lightllm_backend.launch import guard as guard_module
from lightllm_backend.launch.guard import Guard, GuardKeeper, identity, is_alive, is_killed, start_guard
from lightllm_backend.messages.run_directory import guard_lock, run_directory_of
from lightllm_backend.messages.vitals import process_status, read_vitals
from tests.polling import poll

ROOT = Path(__file__).resolve().parents[2]


class Family:
    """A server that ignores SIGTERM, and its processes, under the names that real ones have."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[subprocess.Popen[bytes]] = []
        self.server = self.start([str(folder / "tritonserver")], "trap '' TERM")
        self.directory = run_directory_of(self.server.pid)
        self.region = Path("/dev/shm", f"lightllm_test_{uuid.uuid4()}")

    def start(self, argv: list[str], before: str = "") -> subprocess.Popen[bytes]:
        """Start a shell that sleeps, with these arguments: the first is its name, the second its script.

        Each has a script of its own: rewriting one would end a shell that has not read it yet.
        """
        script = Path(argv[1]) if len(argv) > 1 else self.folder / f"script-{len(self.started)}"
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text(f"{before}\nread line\n")
        self.started.append(
            subprocess.Popen([argv[0], str(script), *argv[2:]], executable="/bin/bash", stdin=subprocess.PIPE)
        )
        return self.started[-1]

    def stub(self, model: str) -> subprocess.Popen[bytes]:
        self.region.touch()
        script = str(self.folder / model / "1" / "model.py")
        return self.start([f"/bin/{STUB}", script, self.region.name, "1", str(self.server.pid)], "trap '' TERM")

    def worker(self, rank: int = 0) -> subprocess.Popen[bytes]:
        return self.start(
            ["python", str(self.folder / "x"), guard_module.WORKER, str(self.directory / "engine"), str(rank)]
        )

    def publish(self, role: str, process: subprocess.Popen[bytes], silent: float = 0.0, busy: float = 0.0) -> None:
        """Write the vitals of a process that has been silent, or busy, for so many seconds."""
        now = time.monotonic()
        fields = struct.pack("dqddqq", now - silent, 0, now - busy if busy else 0.0, 30.0, 0, 0)
        (self.directory / f"{role}-{process.pid}.vitals").write_bytes(fields)

    def guard(self, launcher: str = "") -> Guard:
        return Guard(identity(self.server.pid), self.directory, launcher)

    def end(self) -> None:
        for process in self.started:
            process.kill()
            process.wait()
            assert process.stdin is not None
            process.stdin.close()
        self.region.unlink(missing_ok=True)


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Family]:
    monkeypatch.delenv("LIGHTLLM_RUN_DIR", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    family = Family(tmp_path)
    yield family
    family.end()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard_module, "STOPPED_SECONDS", 0.5)
    monkeypatch.setattr(guard_module, "SCAN_SECONDS", 0.0)


def lives(process: subprocess.Popen[bytes]) -> bool:
    return is_alive(identity(process.pid))


# As a process


@pytest.fixture
def guard_process(family: Family) -> Iterator[subprocess.Popen[bytes]]:
    guard_lock(family.directory).touch()
    started = start_guard(identity(family.server.pid), family.directory, sys.executable)
    assert started is not None
    yield started
    started.kill()
    started.wait()


def test_nothing_outlives_a_dead_server(family: Family, guard_process: subprocess.Popen[bytes]) -> None:
    left = [family.stub("tokenizer"), family.worker()]
    family.publish("tokenizer", left[0])
    (family.directory / "engine").touch()
    family.server.kill()
    assert guard_process.wait(60) == 0
    assert not any(map(lives, left))
    assert not family.directory.exists()
    assert not family.region.exists()


def test_a_dead_step_is_the_end_of_its_server(family: Family, guard_process: subprocess.Popen[bytes]) -> None:
    """Also of one that does not obey SIGTERM, as a real one does not then."""
    stub, other = family.stub("detokenizer"), family.stub("tokenizer")
    family.publish("detokenizer", stub)
    stub.kill()
    assert guard_process.wait(60) == 0
    assert not lives(family.server)
    assert not lives(other)


def test_a_step_that_has_left_in_order_is_none(family: Family) -> None:
    stub = family.stub("detokenizer")
    family.publish("detokenizer", stub)
    guard = family.guard()
    assert guard.check(read_vitals(family.directory)) is None
    (family.directory / f"detokenizer-{stub.pid}.vitals").unlink()
    stub.kill()
    stub.wait()
    assert guard.check(read_vitals(family.directory)) is None


def test_there_is_one_guard_and_a_killed_one_is_replaced(
    family: Family, guard_process: subprocess.Popen[bytes]
) -> None:
    server = identity(family.server.pid)
    assert start_guard(server, family.directory, sys.executable) is None
    guard_process.kill()
    guard_process.wait()
    second = start_guard(server, family.directory, sys.executable)
    assert second is not None
    family.server.kill()
    assert second.wait(60) == 0
    assert start_guard(server, family.directory, sys.executable) is None, "it has done its work"
    assert not family.directory.exists()


@pytest.mark.parametrize("when", ["before it is opened", "once it is open"])
def test_none_is_started_after_one_that_has_cleaned_up(
    family: Family, guard_process: subprocess.Popen[bytes], when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock is gone, though the directory is there for one moment more; or it was opened in time."""
    server = identity(family.server.pid)
    keeper = GuardKeeper(server, family.directory, sys.executable)
    keeper.keep()

    def clean_up() -> None:
        family.server.kill()
        assert guard_process.wait(60) == 0

    if when == "once it is open":
        flock = fcntl.flock

        def late(*arguments: int) -> None:
            clean_up()
            flock(*arguments)

        monkeypatch.setattr(fcntl, "flock", late)
    else:
        clean_up()
        family.directory.mkdir()
    keeper.keep()
    assert children(os.getpid(), "launch.guard") == []
    assert not guard_lock(family.directory).exists()


def test_a_stopped_guard_is_replaced_unless_it_goes_on_in_time(
    family: Family, quick: None, capfd: pytest.CaptureFixture[str]
) -> None:
    keeper = GuardKeeper(identity(family.server.pid), family.directory, sys.executable)
    keeper.keep()
    [first] = children(os.getpid(), "launch.guard")
    os.kill(first, signal.SIGSTOP)
    assert poll(lambda: process_status(first) == psutil.STATUS_STOPPED)
    keeper.keep()
    os.kill(first, signal.SIGCONT)
    assert poll(lambda: process_status(first) != psutil.STATUS_STOPPED)
    keeper.keep()
    time.sleep(0.5)  # STOPPED_SECONDS: that it was stopped once does not count
    os.kill(first, signal.SIGSTOP)
    assert poll(lambda: process_status(first) == psutil.STATUS_STOPPED)
    keeper.keep()
    assert is_alive(identity(first))

    def guards() -> list[int]:
        keeper.keep()
        return [pid for pid in children(os.getpid(), "launch.guard") if identity(pid) and pid != first]

    assert poll(guards)
    assert f"the guard (process {first}) is stopped and replaced" in capfd.readouterr().err
    family.server.kill()
    assert poll(lambda: not family.directory.exists()), "the second one works"


KEEPER = """
import os, sys, time
from pathlib import Path
from lightllm_backend.launch import guard
guard.CHECK_SECONDS = 0.05
guard.keep_guard(os.getppid(), Path(sys.argv[1]), sys.executable)
sys.stdin.read()
"""


def test_who_keeps_a_guard_replaces_it(family: Family) -> None:
    directory = run_directory_of(os.getpid())
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", KEEPER, str(directory)], stdin=subprocess.PIPE, env=environment
    ) as keeper:
        seen: set[int] = set()

        def guards() -> set[int]:
            return {pid for pid in children(keeper.pid) if identity(pid)} - seen

        for _ in range(2):
            assert poll(guards)
            [guard] = guards()
            seen.add(guard)
            os.kill(guard, signal.SIGKILL)
        assert poll(guards)
        for guard in guards():
            os.kill(guard, signal.SIGKILL)
        keeper.kill()


def children(pid: int, part: str = "") -> list[int]:
    """The pids of a process's children with this part in their command lines."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    pids = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    return [child for child in pids if part in Path(f"/proc/{child}/cmdline").read_text()]


def test_a_server_that_is_killed_with_its_steps_is_not_ended_for_them(
    family: Family, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its steps are dead, and it is not yet."""
    stub = family.stub("detokenizer")
    family.publish("detokenizer", stub)
    stub.kill()
    stub.wait()
    monkeypatch.setattr(guard_module, "is_killed", lambda process: True)
    guard = family.guard()
    monkeypatch.setattr(guard, "_wait", lambda pids: (family.server.kill(), family.server.wait()))
    guard.run()
    assert capfd.readouterr().err == ""
    assert not family.directory.exists()


def test_a_killed_process_is_known_before_it_is_dead() -> None:
    """It takes milliseconds to free the memory."""
    program = "memory = b'1' * (200 << 20); print(flush=True); input()"
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        known = identity(process.pid)
        assert not is_killed(known)
        process.kill()
        assert is_killed(known)
        process.wait()
        assert is_killed(known)


# Its judgement


def checks_until(guard: Guard, family: Family, seconds: float) -> str | None:
    """What the guard says once it says something; None: nothing within these seconds."""
    said: list[str | None] = []

    def check() -> bool:
        said.append(guard.check(read_vitals(family.directory)))
        return said[-1] is not None

    poll(check, seconds, every=0.05)
    return said[-1]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("has_vitals", [True, False], ids=["serving", "loading"])
def test_a_step_that_stays_stopped_is_the_end(family: Family, has_vitals: bool) -> None:
    stub = family.stub("generation")
    if has_vitals:
        family.publish("generation", stub)
    guard = family.guard()
    assert checks_until(guard, family, 0.5) is None
    stub.send_signal(signal.SIGSTOP)
    assert checks_until(guard, family, 5) == f"generation (process {stub.pid}) is stopped"


@pytest.mark.usefixtures("quick")
def test_a_server_that_stays_stopped_is_ended(family: Family) -> None:
    family.server.send_signal(signal.SIGSTOP)
    assert checks_until(family.guard(), family, 5) == f"tritonserver (process {family.server.pid}) is stopped"


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("has_vitals", [True, False], ids=["serving", "loading"])
def test_a_worker_that_stays_stopped_is_killed(
    family: Family, has_vitals: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    worker = family.worker(1)
    if has_vitals:
        family.publish("worker-1", worker)
    worker.send_signal(signal.SIGSTOP)
    guard = family.guard()
    assert poll(lambda: guard.check(read_vitals(family.directory)) is not None or not lives(worker))
    assert not lives(worker)
    assert guard.check(read_vitals(family.directory)) is None, "the supervisor sees to dead workers"
    assert (
        f"error: the engine is replaced: worker{'-1' * has_vitals} (process {worker.pid}) is" in capfd.readouterr().err
    )


@pytest.mark.usefixtures("quick")
def test_a_process_that_goes_on_in_time_is_left_alone(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    stub = family.stub("generation")
    family.publish("generation", stub)
    guard = family.guard()
    for _ in range(4):  # longer in all than is allowed at once
        stub.send_signal(signal.SIGSTOP)
        assert checks_until(guard, family, 0.15) is None
        stub.send_signal(signal.SIGCONT)
        assert checks_until(guard, family, 0.15) is None


@pytest.mark.parametrize(("silent", "busy"), [(11.0, 0.0), (0.0, 31.0)])
def test_a_late_process_has_some_time_more(
    family: Family, monkeypatch: pytest.MonkeyPatch, silent: float, busy: float
) -> None:
    monkeypatch.setattr(guard_module, "LATE_SECONDS", 0.4)
    stub = family.stub("tokenizer")
    family.publish("tokenizer", stub, silent, busy)
    guard = family.guard()
    assert checks_until(guard, family, 0.2) is None
    assert f"tokenizer (process {stub.pid}) has " in str(checks_until(guard, family, 5))


def test_a_guard_that_was_held_up_itself_begins_anew(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the machine, or the container, was paused: then everybody is late."""
    monkeypatch.setattr(guard_module, "LATE_SECONDS", 0.4)
    family.publish("tokenizer", family.stub("tokenizer"), silent=11.0)
    guard = family.guard()
    for _ in range(3):
        assert guard.check(read_vitals(family.directory)) is None
        time.sleep(0.3)


def test_the_launch_command_s_death_is_the_end(family: Family) -> None:
    launcher = family.start(["launcher"])
    guard = family.guard(identity(launcher.pid))
    assert guard.check([]) is None
    launcher.kill()
    assert poll(lambda: guard.check([]) == "the launch command is dead")
    assert family.guard("4999999:12345").check([]) == "the launch command is dead", "before the guard began"


def test_an_identity_is_one_process_s(family: Family) -> None:
    pid, started = identity(family.server.pid).split(":")
    assert is_alive(f"{pid}:{started}")
    assert not is_alive(f"{pid}:{int(started) + 1}"), "another process with the pid"
    assert not is_alive(identity(4_999_999))
    family.server.kill()
    assert poll(lambda: not is_alive(f"{pid}:{started}")), "a zombie is dead"
