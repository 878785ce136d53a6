# SPDX-License-Identifier: Apache-2.0
"""The batches that rank 0 sends are those that a follower receives, in order, until rank 0 is gone."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from lightllm_backend.messages.channel import ChannelClosed
from lightllm_backend.request import SamplingParams
from lightllm_backend.router.batch import Admission, Batch
from lightllm_backend.worker import batch_channel
from lightllm_backend.worker.batch_channel import BatchReceiver, BatchSender

EVERYTHING = SamplingParams(
    max_tokens=7, do_sample=True, temperature=0.7, top_p=0.9, top_k=50, min_p=0.1, presence_penalty=0.1,
    frequency_penalty=0.2, repetition_penalty=1.1, seed=2**64 - 1, min_tokens=3, ignore_eos=True, stop_words=("a", "ß"),
    logit_bias=((5, -100.0), (70000, 0.5)), return_log_probs=True, top_logprobs=20,
)  # fmt: skip


def batch_of(num_decodes: int, prompts: list[tuple[int, ...]]) -> Batch:
    lengths = np.array([1] * num_decodes + [len(prompt) for prompt in prompts], dtype=np.int32)
    rows = np.arange(len(lengths), dtype=np.int32)[::-1].copy()
    admitted = tuple(
        Admission(int(row), prompt, EVERYTHING, prompt[1:], prompt[:2], is_recomputed=len(prompt) == 1)
        for row, prompt in zip(rows[num_decodes:], prompts, strict=True)
    )
    slots = np.arange(2 * lengths.sum(), dtype=np.int32).reshape(2, -1) * 3
    return Batch(rows, rows * 5, lengths, slots, rows % 2 == 0, num_decodes, admitted)


BATCHES = [
    batch_of(0, [(1, 2, 3), (70000,)]),
    batch_of(5, []),
    batch_of(3, [(9,)]),
    batch_of(1000, [tuple(range(200_000))]),  # more than a socket holds
]


def same(one: Batch, other: Batch) -> bool:
    arrays = ("rows", "starts", "lengths", "slots", "samples")
    pairs = [(getattr(one, name), getattr(other, name)) for name in arrays]
    return (
        all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)
        and one.num_decodes == other.num_decodes
        and one.admitted == other.admitted
    )


def test_every_follower_gets_every_batch(tmp_path) -> None:
    address = str(tmp_path / "batches")
    sender = BatchSender(address, num_followers=2)
    received: list[list[Batch]] = [[], []]
    closed = []

    def follow(which: int) -> None:
        receiver = BatchReceiver.connect(address)
        try:
            while True:
                received[which].append(receiver.receive())
        except ChannelClosed:
            closed.append(which)

    followers = [threading.Thread(target=follow, args=(which,)) for which in (0, 1)]
    for follower in followers:
        follower.start()
    sender.accept()
    for batch in BATCHES:
        sender.send(batch)
    sender.close()
    for follower in followers:
        follower.join(60)
    assert sorted(closed) == [0, 1]
    for batches in received:
        assert len(batches) == len(BATCHES)
        assert all(same(one, other) for one, other in zip(batches, BATCHES, strict=True))


def test_a_follower_that_is_gone_is_noticed(tmp_path, monkeypatch) -> None:
    address = str(tmp_path / "batches")
    sender = BatchSender(address, num_followers=1)
    receiver = BatchReceiver.connect(address)
    sender.accept()
    monkeypatch.setattr(batch_channel, "LOSS_SECONDS", 0.01)
    assert not sender.has_lost_one()
    receiver.close()
    assert sender.has_lost_one()
    with pytest.raises(ChannelClosed):
        sender.send(BATCHES[0])
    sender.close()


def test_one_rank_has_nobody_to_send_to(tmp_path) -> None:
    sender = BatchSender(str(tmp_path / "batches"), num_followers=0)
    sender.accept()
    sender.send(BATCHES[0])
    sender.close()
    assert list(tmp_path.iterdir()) == []
