# SPDX-License-Identifier: Apache-2.0
"""The run directory is private, one for each server, and removed after use."""

import os
from pathlib import Path

import psutil
import pytest

from lightllm_backend.messages import run_directory as run_directory_module
from lightllm_backend.messages.engine_load import EngineLoad
from lightllm_backend.messages.run_directory import (
    batches_address,
    engine_address,
    leave_run_directory,
    load_file,
    remove_addresses,
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
    with pytest.raises(PermissionError, match="only this user"):
        run_directory()


def test_a_link_in_its_place_is_refused(base: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    base.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PermissionError):
        run_directory()


def test_the_last_to_leave_it_removes_it(base: Path) -> None:
    (run_directory() / "engine").touch()
    leave_run_directory()
    assert (run_directory() / "engine").exists(), "somebody is still there"
    (run_directory() / "engine").unlink()
    leave_run_directory()
    assert list(base.iterdir()) == []
    leave_run_directory()  # it is made again, and gone again
    assert list(base.iterdir()) == []


def test_the_key_stays_for_as_long_as_anybody_needs_it(base: Path) -> None:
    sealed = Seal.of(run_directory(), Purpose.TOKENS).close(b"message")
    (run_directory() / "somebody's vitals").touch()
    leave_run_directory()
    assert Seal.of(run_directory(), Purpose.TOKENS).open(sealed) == b"message"
    (run_directory() / "somebody's vitals").unlink()
    leave_run_directory()
    assert list(base.iterdir()) == []


def test_the_environment_may_name_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTLLM_RUN_DIR", str(tmp_path / "a" / "b"))
    assert run_directory() == run_directory_of(1) == tmp_path / "a" / "b"
    assert run_directory().is_dir()
    remove_stale_run_directories()
    leave_run_directory()
    assert (tmp_path / "a" / "b").is_dir(), "whoever names it removes it"


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


def test_the_last_model_removes_the_shared_file(base: Path) -> None:
    directory = run_directory()
    EngineLoad(directory)
    (directory / "another").touch()
    leave_run_directory()
    assert load_file(directory).exists(), "another model still uses it"
    (directory / "another").unlink()
    leave_run_directory()
    assert not directory.exists()
