# SPDX-License-Identifier: Apache-2.0
"""The run directory is private, one for each server, and removed after use."""

import errno
import fcntl
import os
import tempfile
from pathlib import Path

import psutil
import pytest

from lightllm_backend.messages import run_directory as run_directory_module
from lightllm_backend.messages.engine_load import EngineLoad
from lightllm_backend.messages.run_directory import (
    RunDirectoryError,
    batches_address,
    check_run_directory,
    engine_address,
    guard_lock,
    remove_addresses,
    remove_run_directory,
    remove_stale_run_directories,
    rendezvous_file,
    return_address,
    run_directory,
    run_directory_of,
)
from lightllm_backend.messages.seal import Purpose, Seal


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("LIGHTLLM_RUN_DIR", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / f"lightllm-{os.getuid()}"


def test_it_is_private_and_the_same_for_all_children_of_one_server(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = os.getppid()
    assert run_directory() == run_directory_of(server)
    assert run_directory().parent == base
    assert run_directory().stat().st_mode & 0o777 == base.stat().st_mode & 0o777 == 0o700
    assert run_directory_of(os.getpid()) != run_directory_of(server), "two servers do not meet"


def test_a_pid_that_is_used_again_is_another_server(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = run_directory()
    created = psutil.Process(os.getppid()).create_time()
    monkeypatch.setattr(run_directory_module.psutil.Process, "create_time", lambda self: created + 100)
    assert run_directory() != before


def test_a_directory_that_others_may_use_is_refused(base: Path) -> None:
    base.mkdir()
    base.chmod(0o755)
    with pytest.raises(RunDirectoryError, match="only this user"):
        run_directory()


def test_a_link_in_its_place_is_refused(base: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    base.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunDirectoryError):
        run_directory()


def test_it_is_removed_with_all_that_a_server_left(base: Path) -> None:
    directory = run_directory()
    for name in ("engine", "step-1.vitals", "guard"):
        (directory / name).touch()
    EngineLoad(directory)
    Seal.of(directory, Purpose.TOKENS)
    remove_run_directory(directory)
    assert list(base.iterdir()) == []


def test_others_may_have_removed_it(base: Path) -> None:
    directory = run_directory()
    remove_run_directory(directory)
    remove_run_directory(directory)
    assert list(base.iterdir()) == []


def test_what_a_dead_server_left_is_its_guard_s_to_remove(base: Path) -> None:
    run_directory()
    dead = base / "4999999-12345"
    dead.mkdir()
    with guard_lock(dead).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        remove_stale_run_directories()
        assert guard_lock(dead).exists()
    remove_stale_run_directories()
    assert not dead.exists()


def test_the_environment_may_name_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTLLM_RUN_DIR", str(tmp_path / "a" / "b"))
    assert run_directory() == run_directory_of(1) == tmp_path / "a" / "b"
    assert run_directory().is_dir()
    for name in ("engine", "step-1.vitals", "guard", "notes"):
        (run_directory() / name).touch()
    remove_stale_run_directories()
    remove_run_directory(run_directory())
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["notes"], "whoever names it removes it"


def test_what_dead_servers_left_is_removed_and_nothing_else(base: Path) -> None:
    own, other = run_directory(), run_directory_of(os.getpid())
    reused = base / f"{os.getpid()}-12345"  # the pid lives, but it is another process
    dead = base / "4999999-12345"
    for directory in (reused, dead):
        directory.mkdir()
        (directory / "engine").touch()
    foreign = base / "notes"
    foreign.mkdir()
    remove_stale_run_directories()
    assert {path.name for path in base.iterdir()} == {own.name, other.name, foreign.name}


def test_all_addresses_are_removed(tmp_path: Path) -> None:
    engine = engine_address(tmp_path)
    addresses = {engine, batches_address(engine), rendezvous_file(engine), return_address(tmp_path)}
    for address in addresses:
        Path(address).touch()
    assert len(list(tmp_path.iterdir())) == len(addresses) == 4, "each in the run directory, under its own name"
    remove_addresses(tmp_path)
    remove_addresses(tmp_path)
    assert list(tmp_path.iterdir()) == []


# Before the start


def test_a_directory_that_does_not_exist_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LIGHTLLM_RUN_DIR", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(
        RunDirectoryError, match="nowhere/.* cannot be made: No such file .*; set LIGHTLLM_RUN_DIR, XDG"
    ):
        check_run_directory()


@pytest.mark.parametrize("variable", ["TMPDIR", "XDG_RUNTIME_DIR", "LIGHTLLM_RUN_DIR"])
def test_a_path_that_is_too_long_for_sockets_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str
) -> None:
    for name in ("TMPDIR", "XDG_RUNTIME_DIR", "LIGHTLLM_RUN_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", None)
    directory = tmp_path / ("x" * 100)
    directory.mkdir()
    monkeypatch.setenv(variable, str(directory))
    with pytest.raises(
        RunDirectoryError, match="paths of \\d+ bytes; allowed: at most 107; set .* with a shorter path"
    ):
        check_run_directory()
    assert not list(tmp_path.rglob(".check*"))


def test_a_directory_without_room_is_told(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(run_directory_module, "MAX_SOCKET_PATH", 4096)  # the tests' own directory may be a long one
    check_run_directory()
    monkeypatch.setattr(Path, "write_bytes", fails)
    with pytest.raises(RunDirectoryError, match="no file can be written in .*: No space left on device; set"):
        check_run_directory()
