# SPDX-License-Identifier: Apache-2.0
"""The messages from the detokenizer to the generation step: what became of each chunk. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from lightllm_backend.messages.channel import Message


@dataclass
class Delivered(Message):
    """The request's chunk in flight was sent to the client, or had nothing to show. The next one may come.

    state: a DecodeState as JSON, which goes along with the next chunk unread; None if it has not changed.
    """

    uid: str
    state: str | None


@dataclass
class ClientGone(Message):
    """The client of this request is gone."""

    uid: str


@dataclass
class DecodingFailed(Message):
    """The request's chunk in flight could not be decoded; its client was told so."""

    uid: str
    reason: str
