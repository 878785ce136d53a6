# SPDX-License-Identifier: Apache-2.0
"""Seal: shows that a message between the steps was made by this server. Standard library only.

Anybody who may call the server may call a single step. So a step believes nothing but what carries the server's seal: a
MAC under a key that only the processes of this server can read.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
import stat
from enum import Enum
from pathlib import Path

KEY_FILE = "seal-key"  # in the run directory
_KEY_BYTES = 32
TAG_BYTES = 16  # 128 bits cannot be guessed; more would travel with each chunk


class Purpose(Enum):
    """What a seal is for. A seal for one purpose is none for another."""

    TOKENS = b"tokens"  # tokenizer to generation
    CHUNK = b"chunk"  # generation to the detokenizer
    RETURNS = b"returns"  # detokenizer to generation


class NotSealed(ValueError):
    """The message does not carry this server's seal."""


class Seal:
    """Seals and opens messages of one purpose."""

    def __init__(self, key: bytes, purpose: Purpose) -> None:
        self._keyed = hashlib.blake2b(key=key, digest_size=TAG_BYTES, person=purpose.value)

    @classmethod
    def of(cls, run_directory: Path, purpose: Purpose) -> Seal:
        """The seal of the server with this run directory."""
        return cls(_key(run_directory / KEY_FILE), purpose)

    def close(self, message: bytes, beside: bytes = b"") -> bytes:
        """Return the message behind its tag. `beside` is covered too, but travels by itself."""
        return self._tag(message, beside) + message

    def open(self, sealed: bytes, beside: bytes = b"") -> bytes:
        """Return the message that was sealed; raise NotSealed for any other bytes."""
        tag, message = sealed[:TAG_BYTES], sealed[TAG_BYTES:]
        if not hmac.compare_digest(tag, self._tag(message, beside)):
            raise NotSealed
        return message

    def _tag(self, message: bytes, beside: bytes) -> bytes:
        mac = self._keyed.copy()
        mac.update(len(message).to_bytes(8, "little"))  # so that no byte can move from the one to the other
        mac.update(message)
        mac.update(beside)
        return mac.digest()


def _key(path: Path) -> bytes:
    """The key in this file. Whoever comes first makes it, whole or not at all."""
    if not path.exists():
        draft = path.with_name(f"{KEY_FILE}.{secrets.token_hex(8)}")
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(_KEY_BYTES))
        with contextlib.suppress(FileExistsError):  # another process was first
            os.link(draft, path)
        draft.unlink()
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        status = os.fstat(file.fileno())
        key = file.read(_KEY_BYTES + 1)
    private = stat.S_ISREG(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077
    if not private or len(key) != _KEY_BYTES:
        raise PermissionError(f"{path} is not a key of {_KEY_BYTES} bytes that only this user can read; remove it")
    return key
