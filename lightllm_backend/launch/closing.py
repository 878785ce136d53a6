# SPDX-License-Identifier: Apache-2.0
"""Ends a server's requests before the server is ended: they run to their end or get an error. No torch."""

from __future__ import annotations

import time
from pathlib import Path

from lightllm_backend.messages.channel import Channel, ChannelClosed
from lightllm_backend.messages.engine_messages import CloseEngine
from lightllm_backend.messages.run_directory import engine_address
from lightllm_backend.messages.vitals import ENGINE, Reading, read_vitals

# From one look at the vitals to the next. A request passes from one step to the next in far less, also on a busy core.
LOOK_SECONDS = 0.3


class EngineCloser:
    """Makes the engine of a server refuse requests and end its own. One thread uses it.

    Sending does not wait for the worker, which reads between two steps.
    """

    def __init__(self, directory: Path) -> None:
        self._address = engine_address(directory)
        self._channel: Channel | None = None  # stays open: a worker drops the messages of a client that is gone

    def close_engine(self, reason: str, drain: bool = False) -> None:
        """End all requests with UNAVAILABLE and this reason, and refuse later ones with it, if there is an engine.

        drain: requests that run may go on. Call it again and again then, since a new worker knows nothing of it.
        """
        for _ in range(2):  # the worker may have been replaced since the last call
            try:
                self._channel = self._channel or Channel.connect(self._address)
                self._channel.send(CloseEngine(reason, drain))
                return
            except ChannelClosed:
                self.disconnect()

    def disconnect(self) -> None:
        if self._channel:
            self._channel.close()
        self._channel = None


class Progress:
    """What has changed in a server between two looks at its vitals, LOOK_SECONDS apart."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._before: list[Reading] = []
        self._readings: list[Reading] = []

    def look(self) -> None:
        time.sleep(LOOK_SECONDS)
        self._before, self._readings = self._readings, [one for one in read_vitals(self._directory) if one.alive]

    @property
    def engine_rests(self) -> bool:
        """Whether the engine has computed nothing since the last look."""
        return self._rests(ENGINE)

    @property
    def delivered(self) -> bool:
        """Whether no request is open, and the detokenizers have sent nothing since the last look."""
        return self.num_open == 0 and self._rests("detokenizer")

    @property
    def num_open(self) -> int:
        """The requests that have not been answered."""
        return sum(reading.open for reading in self._readings)

    def _rests(self, role: str) -> bool:
        before, now = (
            {(one.pid, one.taken) for one in readings if one.role == role}
            for readings in (self._before, self._readings)
        )
        return before == now and not any(one.busy_since for one in self._readings if one.role == role)


def wait_delivered(directory: Path, seconds: float) -> bool:
    """Wait until every answer has been sent, for `seconds` at most; return whether it has."""
    end = time.monotonic() + seconds
    progress = Progress(directory)
    progress.look()
    while time.monotonic() < end:
        progress.look()
        if progress.delivered:
            return True
    return False
