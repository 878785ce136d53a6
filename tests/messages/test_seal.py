# SPDX-License-Identifier: Apache-2.0
"""The seal covers every byte, for one purpose and one server; its key is made once and is private."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightllm_backend.messages.seal import KEY_FILE, TAG_BYTES, NotSealed, Purpose, Seal

KEY = b"k" * 32
SEAL = Seal(KEY, Purpose.CHUNK)


@given(st.binary(max_size=64), st.binary(max_size=64))
@settings(max_examples=50, derandomize=True)
def test_what_was_sealed_opens(message: bytes, beside: bytes) -> None:
    assert SEAL.open(SEAL.close(message, beside), beside) == message


@given(st.binary(max_size=40), st.binary(max_size=40), st.data())
@settings(max_examples=200, derandomize=True)
def test_no_other_bytes_open(message: bytes, beside: bytes, data: st.DataObject) -> None:
    sealed = SEAL.close(message, beside)
    forged, forged_beside = data.draw(
        st.tuples(st.binary(max_size=80), st.just(beside))
        | st.tuples(st.just(sealed[:-1]), st.just(sealed[-1:] + beside))
        | st.tuples(st.just(sealed + beside[:1]), st.just(beside[1:]))
        | st.integers(0, 8 * len(sealed) - 1).map(lambda bit: (flipped(sealed, bit), beside))
    )
    if (forged, forged_beside) != (sealed, beside):
        with pytest.raises(NotSealed):
            SEAL.open(forged, forged_beside)


def flipped(message: bytes, bit: int) -> bytes:
    return message[: bit // 8] + bytes([message[bit // 8] ^ 1 << bit % 8]) + message[bit // 8 + 1 :]


def test_a_seal_is_for_one_server_and_one_purpose() -> None:
    sealed = SEAL.close(b"message")
    for other in (Seal(KEY, Purpose.TOKENS), Seal(KEY, Purpose.RETURNS), Seal(b"x" * 32, Purpose.CHUNK)):
        with pytest.raises(NotSealed):
            other.open(sealed)
    assert len(sealed) == TAG_BYTES + len(b"message")
    assert KEY not in sealed


def make(directory: Path, barrier: multiprocessing.synchronize.Barrier) -> None:
    barrier.wait()
    sealed = Seal.of(directory, Purpose.TOKENS).close(b"message")
    (directory / f"sealed.{os.getpid()}").write_bytes(sealed)


def test_processes_that_start_together_have_one_key(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    processes = [context.Process(target=make, args=(tmp_path, barrier)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    sealed = [path.read_bytes() for path in tmp_path.glob("sealed.*")]
    assert len(sealed) == 4
    assert len(set(sealed)) == 1
    assert (tmp_path / KEY_FILE).stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.glob(f"{KEY_FILE}*")] == [KEY_FILE], "no draft is left"


def test_two_servers_have_two_keys(tmp_path: Path) -> None:
    one, other = (tmp_path / name for name in ("one", "other"))
    for directory in (one, other):
        directory.mkdir()
    with pytest.raises(NotSealed):
        Seal.of(other, Purpose.CHUNK).open(Seal.of(one, Purpose.CHUNK).close(b"message"))


@pytest.mark.parametrize("key", [b"short", b"k" * 33, b""])
def test_a_file_that_is_no_key_is_refused(tmp_path: Path, key: bytes) -> None:
    (tmp_path / KEY_FILE).write_bytes(key)
    (tmp_path / KEY_FILE).chmod(0o600)
    with pytest.raises(PermissionError, match="is not a key of 32 bytes that only this user can read; remove it"):
        Seal.of(tmp_path, Purpose.CHUNK)


def test_a_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / KEY_FILE).write_bytes(KEY)
    (tmp_path / KEY_FILE).chmod(0o640)
    with pytest.raises(PermissionError, match="only this user can read"):
        Seal.of(tmp_path, Purpose.CHUNK)


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(KEY)
    (tmp_path / "elsewhere").chmod(0o600)
    (tmp_path / KEY_FILE).symlink_to("elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        Seal.of(tmp_path, Purpose.CHUNK)
