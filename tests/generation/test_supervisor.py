# SPDX-License-Identifier: Apache-2.0
"""EngineSupervisor, with a worker made for the occasion in place of the interpreter."""

import contextlib
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from lightllm_backend.config import EngineConfig
from lightllm_backend.generation import supervisor as supervisor_module
from lightllm_backend.generation import worker_group
from lightllm_backend.generation.supervisor import EngineSupervisor
from lightllm_backend.generation.worker_group import EngineStartError, worker_environment
from tests.polling import poll

# Runs one line of Python more than a worker that is ready and obeys its parent pipe.
WORKER = """#!{python}
import os, sys
from pathlib import Path
folder = Path({folder!r})
assert sys.argv[1:] == ["-m", "lightllm_backend.worker.main", "/the/address", "0"], sys.argv
with (folder / "starts").open("a") as starts:
    starts.write(os.environ["LIGHTLLM_MAX_QUEUE_SIZE"] + "\\n")
{first}
print("ready", flush=True)
{then}
sys.stdin.read()
(folder / "obeyed").touch()
"""

Make = Callable[..., EngineSupervisor]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    monkeypatch.setattr(supervisor_module, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(worker_group, "STOP_SECONDS", 0.5)
    made: list[EngineSupervisor] = []

    def supervisor(first: str = "", then: str = "", on_restart: Callable[[], None] = lambda: None) -> EngineSupervisor:
        script = tmp_path / "python"
        text = WORKER.format(python=sys.executable, folder=str(tmp_path), first=first, then=then)
        script.write_text(text, encoding="utf-8")
        script.chmod(0o755)
        config = EngineConfig(worker_python=str(script), max_queue_size=77)
        made.append(EngineSupervisor(config, "/the/address", on_restart))
        return made[-1]

    yield supervisor
    for each in made:
        each.stop()


def starts(folder: Path) -> int:
    return len((folder / "starts").read_text().splitlines())


def test_it_waits_until_the_worker_is_ready_and_ends_it_by_the_parent_pipe(make: Make, tmp_path: Path) -> None:
    supervisor = make(first="print('loading')")
    supervisor.wait_ready()
    worker = psutil.Process(supervisor.pids[0])
    assert (tmp_path / "starts").read_text() == "77\n", "the settings are in its environment"
    supervisor.stop()
    assert not worker.is_running()
    assert (tmp_path / "obeyed").exists()


def test_the_worker_s_own_error_is_what_is_raised(make: Make) -> None:
    supervisor = make(first="print('error: no such model'); sys.exit(1)")
    with pytest.raises(EngineStartError, match="^no such model$"):
        supervisor.wait_ready()


STUB = """
import sys
from lightllm_backend.config import EngineConfig
from lightllm_backend.generation.supervisor import EngineSupervisor
assert open(0).encoding.lower() in ("ascii", "ansi_x3.4-1968"), open(0).encoding
try:
    EngineSupervisor(EngineConfig(worker_python=sys.argv[1], max_queue_size=77), "/the/address").wait_ready()
except Exception as error:
    print(ascii(str(error)))
"""


def test_an_error_in_any_script_is_raised_where_the_locale_is_ascii(make: Make, tmp_path: Path) -> None:
    """As it is inside Triton server's stubs, whatever the environment says."""
    make(first="print('error: lm_head ≤ layers.0 … modèle', flush=True); sys.exit(1)")
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", STUB, str(tmp_path / "python")],
        env=environment, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.stdout.strip() == ascii("lm_head ≤ layers.0 … modèle"), done.stderr


def test_a_status_that_cannot_be_read_is_the_end_of_the_start(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __iter__(self) -> Iterator[str]:
            raise ValueError("no text")

    popen = subprocess.Popen

    def broken(*arguments: Any, **options: Any) -> Any:
        worker = popen(*arguments, **options)
        worker.stdout = Broken()  # type: ignore[assignment]
        return worker

    monkeypatch.setattr(worker_group.subprocess, "Popen", broken)
    with pytest.raises(EngineStartError, match="before it was ready"):
        make().wait_ready()


def test_a_worker_that_cannot_be_started(tmp_path: Path) -> None:
    with pytest.raises(EngineStartError, match="rank 0 cannot be started with /no/python"):
        EngineSupervisor(EngineConfig(worker_python="/no/python"), str(tmp_path / "engine"))


def test_a_failure_of_the_watch_does_not_end_it(make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    failures = [RuntimeError("no metrics")]

    def on_restart() -> None:
        if failures:
            raise failures.pop()

    supervisor = make(on_restart=on_restart)
    supervisor.wait_ready()
    psutil.Process(supervisor.pids[0]).kill()
    assert poll(lambda: starts(tmp_path) == 2)
    assert "could not be started again: no metrics" in caplog.text


def test_a_worker_that_ends_without_a_word(make: Make) -> None:
    supervisor = make(first="sys.exit(3)")
    with pytest.raises(EngineStartError, match="exit code 3 before it was ready"):
        supervisor.wait_ready()


def test_a_worker_that_dies_is_started_again(make: Make, tmp_path: Path) -> None:
    restarts: list[bool] = []
    supervisor = make(on_restart=lambda: restarts.append(True))
    supervisor.wait_ready()
    first = supervisor.pids[0]
    psutil.Process(first).kill()
    assert poll(lambda: starts(tmp_path) == 2)
    assert poll(lambda: supervisor.pids[0] != first)
    assert restarts == [True]
    supervisor.stop()
    assert not psutil.pid_exists(supervisor.pids[0])


def test_it_outlives_a_lack_of_file_descriptors(make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    supervisor = make()
    supervisor.wait_ready()
    taken: list[int] = []
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, limits[1]))
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.dup(0))
        os.kill(supervisor.pids[0], signal.SIGKILL)
        assert poll(lambda: caplog.text.count("Too many open files") >= 3)
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert poll(lambda: starts(tmp_path) == 2)


@pytest.mark.parametrize("part", ["kill", "wait_end"])
def test_no_error_ends_the_supervising_thread(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    supervisor = make()
    supervisor.wait_ready()
    works = getattr(worker_group.WorkerGroup, part)

    def fails_once(self: worker_group.WorkerGroup) -> Any:
        monkeypatch.setattr(worker_group.WorkerGroup, part, works)
        raise MemoryError(part)

    if part == "wait_end":  # the thread is in it already; it fails for the next workers
        psutil.Process(supervisor.pids[0]).kill()
    monkeypatch.setattr(worker_group.WorkerGroup, part, fails_once)
    first = supervisor.pids[0]
    if part == "kill":
        psutil.Process(first).kill()
    assert poll(lambda: starts(tmp_path) >= 2 and supervisor.pids[0] != first)
    psutil.Process(supervisor.pids[0]).kill()
    assert poll(lambda: starts(tmp_path) >= 3)


def test_it_tries_again_after_a_start_that_failed(make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    fails_once = "if (folder / 'fail').exists(): (folder / 'fail').unlink(); print('error: not now'); sys.exit(1)"
    supervisor = make(first=fails_once)
    supervisor.wait_ready()
    (tmp_path / "fail").touch()
    psutil.Process(supervisor.pids[0]).kill()
    assert poll(lambda: starts(tmp_path) == 3)
    assert poll(lambda: "the engine serves again" in caplog.text)
    assert "could not be started again: not now" in caplog.text


def test_a_worker_that_does_not_obey_is_killed(make: Make, tmp_path: Path) -> None:
    supervisor = make(then="import time; time.sleep(60)")
    supervisor.wait_ready()
    worker = psutil.Process(supervisor.pids[0])
    supervisor.stop()
    assert not worker.is_running()
    assert not (tmp_path / "obeyed").exists()


def test_stopping_during_a_restart_leaves_no_worker(make: Make, tmp_path: Path) -> None:
    made: list[EngineSupervisor] = []

    def stop_now() -> None:
        """The moment between the pause and the new worker."""
        made[0]._stopping.set()

    supervisor = make(on_restart=stop_now)
    made.append(supervisor)
    supervisor.wait_ready()
    psutil.Process(supervisor.pids[0]).kill()
    assert poll(lambda: not supervisor._watcher.is_alive())
    assert starts(tmp_path) == 1
    assert not psutil.pid_exists(supervisor.pids[0])


def test_the_worker_s_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTLLM_ORIGINAL_LD_LIBRARY_PATH", "/users/own")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/server:/users/own")
    monkeypatch.setenv("PYTHONPATH", "/users/packages")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    environment = worker_environment(EngineConfig(dtype="float16"))
    assert environment["LD_LIBRARY_PATH"] == "/users/own"
    assert environment["LIGHTLLM_DTYPE"] == "float16"
    assert environment["GOMP_SPINCOUNT"] == "10000"
    assert environment["PYTHONUTF8"] == "1", "status lines and paths are UTF-8"
    root = str(Path(__file__).resolve().parents[2])
    assert environment["PYTHONPATH"].split(os.pathsep) == [root, "/users/packages"]
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    environment = worker_environment(EngineConfig())
    assert (environment["OMP_WAIT_POLICY"], environment.get("GOMP_SPINCOUNT")) == ("active", None)
