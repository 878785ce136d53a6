# SPDX-License-Identifier: Apache-2.0
"""The detokenizer's end of the return channel: word to generation of what became of each chunk. No torch."""

from __future__ import annotations

import threading

from lightllm_backend.engine.channel import DELIVERED, FAILED, GONE, Channel, ChannelClosed


class ReturnChannel:
    """Connects when the first chunk tells it where, and again where generation has been loaded anew in between.

    Where there is nobody, words are lost: generation gives all credit back when it loses a connection. Several threads
    may use it.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._address = ""
        self._channel: Channel | None = None

    def connect(self, address: str) -> None:
        """Words go to `address` from now on; an empty one says nothing new."""
        with self._lock:
            if address and address != self._address:
                self._close()
                self._address = address

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
        with self._lock:
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
