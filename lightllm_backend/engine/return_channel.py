# SPDX-License-Identifier: Apache-2.0
"""The detokenizer's end of the return channel: word to generation of what became of each chunk. No torch."""

from __future__ import annotations

from lightllm_backend.engine.channel import DELIVERED, FAILED, GONE, Channel, ChannelClosed


class ReturnChannel:
    """Connects when the first chunk tells it where. Without a connection words are lost, as they are with one that
    breaks: generation then gives all credit back by itself."""

    def __init__(self) -> None:
        self._address = ""
        self._channel: Channel | None = None

    def connect(self, address: str) -> None:
        """Make sure that there is a connection to `address`; an empty one says nothing new."""
        if not address or (self._channel and address == self._address):
            return
        if self._channel:
            self._channel.close()
        self._address = address
        try:
            self._channel = Channel.connect(address)
        except ChannelClosed:
            self._channel = None

    def delivered(self, uid: str) -> None:
        """The chunk in flight has been sent to the client, or there was nothing to show."""
        self._send(DELIVERED, uid)

    def gone(self, uid: str) -> None:
        """The client of the request has gone."""
        self._send(GONE, uid)

    def failed(self, uid: str, message: str) -> None:
        """The chunk could not be decoded, and the client has been told."""
        self._send(FAILED, uid, message)

    def _send(self, *message: object) -> None:
        if self._channel is None:
            return
        try:
            self._channel.send(*message)
        except ChannelClosed:
            self._channel.close()
            self._channel = None
