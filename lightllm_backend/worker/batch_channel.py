# SPDX-License-Identifier: Apache-2.0
"""The batch channel: rank 0 sends each Batch to the followers, ranks 1 and up, before it launches it. No torch.

It is a Unix socket, or a TCP connection to a rank of another host (host_group.py). Median time from `send` to the
arrays in a follower that blocks in `receive`, on two shared CPU cores: 65 µs for 8 sequences, 75 µs for 1,000. Shared
memory with a pipe to wake the follower takes 53 and 60 µs. A follower that spins gets them in 19 and 25 µs, but costs a
core a rank even when idle, and p99 rises to milliseconds where cores are scarce. A GPU waits for none of this: the
batch is sent while the step before it runs.
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightllm_backend.messages.channel import Channel, ChannelClosed, Message, frame_of, listen
from lightllm_backend.request import SamplingParams
from lightllm_backend.router.batch import Admission, Batch, ScoredChunk

CONNECT_PAUSE_SECONDS = 0.02  # rank 0 listens before it loads the model, so hardly anybody waits
LOSS_SECONDS = 1.0  # from the end of one of a process's connections to the end of all, on a busy machine
FLUSH_SECONDS = 1.0  # for the last batch, which rank 0 has launched; a follower that stands still does not read it


@dataclass(eq=False)
class RunBatch(Message):
    """The next batch that a follower runs; arrays travel as raw bytes."""

    batch: Batch

    def pack(self) -> tuple[Any, ...]:
        batch = self.batch
        arrays = (batch.rows, batch.starts, batch.lengths, batch.slots, batch.samples)
        admitted = [_pack_admission(admission) for admission in batch.admitted]
        return *(array.tobytes() for array in arrays), batch.num_decodes, admitted, batch.scored

    @classmethod
    def unpack(cls, *packed: Any) -> RunBatch:
        *integers, samples, num_decodes, admitted, scored = packed
        rows, starts, lengths, slots = (np.frombuffer(array, dtype=np.int32) for array in integers)
        slots = slots.reshape(-1, lengths.sum())
        batch = Batch(
            rows,
            starts,
            lengths,
            slots,
            np.frombuffer(samples, dtype=np.bool_),
            num_decodes,
            tuple(_unpack_admission(*admission) for admission in admitted),
            tuple(ScoredChunk(*chunk) for chunk in scored),
        )
        return cls(batch)


@dataclass(eq=False)
class Masks(Message):
    """The token masks of the batch sent last, as raw bytes."""

    masks: bytes


class BatchSender:
    """Rank 0's end: owns the listener, open from construction, and a channel to each follower."""

    def __init__(self, address: str, num_followers: int) -> None:
        """num_followers: those on this host, which connect to `address`."""
        self._num_missing = num_followers
        self._listener = listen(address) if num_followers else None
        self._followers: list[Channel] = []

    def accept(self) -> None:
        """Wait until all followers on this host have connected."""
        while self._listener and self._num_missing:
            self._followers.append(Channel.accept(self._listener))
            self._num_missing -= 1

    def add(self, follower: Channel) -> None:
        """Send to this follower, on another host, too."""
        self._followers.append(follower)

    def send(self, batch: Batch) -> None:
        """Send the batch to all followers. Raises ChannelClosed if one is gone."""
        self._send(lambda: RunBatch(batch))

    def send_masks(self, masks: NDArray[np.int32]) -> None:
        """Send the masks that the step of the batch sent last waits for."""
        self._send(lambda: Masks(masks.tobytes()))

    def has_lost_one(self) -> bool:
        """Whether a follower is gone, which a failed operation between the ranks may tell first; waits LOSS_SECONDS."""
        ends = select.poll()
        for follower in self._followers:
            ends.register(follower.fileno(), select.POLLRDHUP)
        return bool(self._followers and ends.poll(LOSS_SECONDS * 1e3))

    def _send(self, message: Callable[[], Message]) -> None:
        if self._followers:
            frame = frame_of(message())
            for follower in self._followers:
                follower.send_frame(frame)

    def close(self) -> None:
        """Close all channels; the followers exit when they notice."""
        if self._listener:
            self._listener.close()
        for follower in self._followers:
            follower.flush(FLUSH_SECONDS)
            follower.close()


class BatchReceiver:
    """A follower's end."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    @classmethod
    def connect(cls, address: str) -> BatchReceiver:
        """Connect to a rank 0 on this host; waits for it to listen."""
        while True:
            try:
                return cls(Channel.connect(address))
            except ChannelClosed:
                time.sleep(CONNECT_PAUSE_SECONDS)

    def receive(self) -> Batch:
        """The next batch; blocks. Raises ChannelClosed once rank 0 is gone."""
        message = self._channel.receive()
        assert isinstance(message, RunBatch), message
        return message.batch

    def receive_masks(self, masks: NDArray[np.int32]) -> None:
        """Read the masks of the batch received last into `masks`; blocks as `receive` does."""
        message = self._channel.receive()
        assert isinstance(message, Masks), message
        masks[:] = np.frombuffer(message.masks, dtype=np.int32).reshape(masks.shape)

    def close(self) -> None:
        self._channel.close()


def _pack_admission(admission: Admission) -> list[Any]:
    arrays = (admission.prompt_ids, admission.generated_ids, admission.cached_slots)
    packed = (np.array(ids, dtype=np.int32).tobytes() for ids in arrays)
    return [admission.row, vars(admission.sampling), admission.is_recomputed, *packed]


def _unpack_admission(row: int, sampling: dict[str, Any], is_recomputed: bool, *arrays: bytes) -> Admission:
    prompt_ids, generated_ids, slots = (tuple(np.frombuffer(array, dtype=np.int32).tolist()) for array in arrays)
    return Admission(row, prompt_ids, SamplingParams.from_plain(sampling), generated_ids, slots, is_recomputed)
