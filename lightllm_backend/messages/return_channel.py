# SPDX-License-Identifier: Apache-2.0
"""The detokenizer's end of the return channel: word to generation of what became of each chunk. No torch."""

from __future__ import annotations

from typing import Any

from lightllm_backend.messages.channel import DELIVERED, FAILED, GONE, Channel, ChannelClosed


class ReturnChannel:
    """Connects when a chunk tells it where, and again where generation has been loaded anew in between.

    Where there is nobody, words are lost: the requests have ended with the generation step that they belonged to.
    """

    def __init__(self) -> None:
        self._address = ""
        self._channel: Channel | None = None

    def connect(self, address: str) -> None:
        """Words go to `address` from now on."""
        if address != self._address:
            self._close()
            self._address = address

    def delivered(self, uid: str, state: list[Any] | None) -> None:
        """The chunk in flight has been sent to the client, or there was nothing to show.

        state: what decoding the next one needs to know; None if it has not changed.
        """
        self._send(DELIVERED, uid, state)

    def gone(self, uid: str) -> None:
        """The client of the request has gone."""
        self._send(GONE, uid)

    def failed(self, uid: str, message: str) -> None:
        """The chunk could not be decoded, and the client has been told."""
        self._send(FAILED, uid, message)

    def _send(self, *message: object) -> None:
        had_connection = self._channel is not None
        try:
            if self._channel is None:
                self._channel = Channel.connect(self._address)
            self._channel.send(*message)
        except ChannelClosed:
            self._close()
            if had_connection:  # it may have been to a generation step that is no more
                self._send(*message)

    def _close(self) -> None:
        if self._channel:
            self._channel.close()
        self._channel = None
