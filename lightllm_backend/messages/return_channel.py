# SPDX-License-Identifier: Apache-2.0
"""ReturnChannel: the detokenizer's end of the channel that tells generation what became of each chunk. No torch."""

from __future__ import annotations

from lightllm_backend.messages.channel import Channel, ChannelClosed, Message
from lightllm_backend.messages.return_messages import Introduction
from lightllm_backend.messages.seal import Seal


class ReturnChannel:
    """Connects to generation's address, and again after generation has been loaded anew; begins with an Introduction.

    A message is dropped if nobody listens: its request has ended with the generation step that it belonged to.
    """

    def __init__(self, address: str, seal: Seal) -> None:
        self._address = address
        self._seal = seal
        self._channel: Channel | None = None

    def send(self, message: Message) -> None:
        """Send the message, or drop it if nobody listens."""
        had_connection = self._channel is not None
        try:
            if self._channel is None:
                self._channel = Channel.connect(self._address)
                self._channel.send(Introduction.under(self._seal))
            self._channel.send(message)
        except ChannelClosed:
            self._close()
            if had_connection:  # to a generation step that may have been replaced
                self.send(message)

    def _close(self) -> None:
        if self._channel:
            self._channel.close()
        self._channel = None
