# SPDX-License-Identifier: Apache-2.0
"""The messages from the detokenizer to the generation step: what became of each chunk. No torch.

Each checks the types of what it unpacks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightllm_backend.messages.channel import Message
from lightllm_backend.messages.seal import Seal


@dataclass
class Introduction(Message):
    """The first message: it shows that the sender is a step of this server. Whoever has none is not listened to."""

    sealed: bytes

    @classmethod
    def under(cls, seal: Seal) -> Introduction:
        return cls(seal.close(b""))

    def check(self, seal: Seal) -> None:
        """Raise NotSealed if another server's process, or none of a server, has sent it."""
        seal.open(self.sealed)

    @classmethod
    def unpack(cls, *packed: Any) -> Introduction:
        return cls(*_typed(packed, bytes))


@dataclass
class Delivered(Message):
    """The request's chunk in flight was sent to the client, or had nothing to show. The next one may come.

    state: a packed DecodeState, which goes along with the next chunk unread; None if it has not changed.
    """

    uid: str
    state: bytes | None

    @classmethod
    def unpack(cls, *packed: Any) -> Delivered:
        return cls(*_typed(packed, str, bytes | None))


@dataclass
class ClientGone(Message):
    """The client of this request is gone."""

    uid: str

    @classmethod
    def unpack(cls, *packed: Any) -> ClientGone:
        return cls(*_typed(packed, str))


@dataclass
class DecodingFailed(Message):
    """The request's chunk in flight could not be decoded; its client was told so."""

    uid: str
    reason: str

    @classmethod
    def unpack(cls, *packed: Any) -> DecodingFailed:
        return cls(*_typed(packed, str, str))


def _typed(packed: tuple[Any, ...], *types: Any) -> tuple[Any, ...]:
    """The values, if they are of these types."""
    if len(packed) != len(types) or not all(map(isinstance, packed, types)):
        raise ValueError(f"{[type(value).__name__ for value in packed]} are not the types of such a message")
    return packed
