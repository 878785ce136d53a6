# SPDX-License-Identifier: Apache-2.0
"""What detokenizers say to the streams of a process: credit, and whose client has gone."""

from __future__ import annotations

from typing import Any

import pytest

from lightllm_backend.generation import send_queue as send_queue_module
from lightllm_backend.generation.streams import Streams
from lightllm_backend.messages.channel import Channel, ChannelClosed, Message
from lightllm_backend.messages.return_channel import ReturnChannel
from lightllm_backend.messages.return_messages import ClientGone, DecodingFailed, Delivered, Introduction
from lightllm_backend.messages.seal import Purpose, Seal
from lightllm_backend.request import FinishReason
from lightllm_backend.text.tokenizer import Tokenizer
from tests.generation.stand_ins import SEAL, FakeEngine, introduced, submit
from tests.polling import poll


@pytest.mark.usefixtures("without_probes")
def test_the_return_channel_gives_credit_and_tells_who_has_gone(
    streams: Streams, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    returns = ReturnChannel(streams.return_address, SEAL)
    responder = submit(streams, tokenizer)
    engine.make("u0", [1])
    assert poll(lambda: responder.ids == [[1]])
    engine.make("u0", [2])
    returns.send(Delivered("u0", b"state"))
    assert poll(lambda: responder.ids == [[1], [2]])
    assert responder.states == [None, b"state"]
    returns.send(Delivered("unknown", None))
    returns.send(ClientGone("u0"))
    assert poll(lambda: engine.cancelled == ["u0"])


@pytest.mark.usefixtures("without_probes")
def test_several_detokenizers_give_credit(streams: Streams, engine: FakeEngine, tokenizer: Tokenizer) -> None:
    channels = [introduced(streams) for _ in range(3)]
    responder = submit(streams, tokenizer)
    for number, channel in enumerate(channels):
        engine.make("u0", [number])
        assert poll(lambda number=number: len(responder.sent) == number + 1)
        channel.send(Delivered("u0", str(number).encode()))
    engine.make("u0", [], FinishReason.STOP)
    assert poll(lambda: responder.ids == [[0], [1], [2], []])
    assert responder.states == [None, b"0", b"1", b"2"]
    for channel in channels:
        channel.close()


def test_another_detokenizer_may_connect_after_the_first(
    streams: Streams, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    Channel.connect(streams.return_address).close()
    responder = submit(streams, tokenizer)
    channel = introduced(streams)
    assert poll(lambda: responder.probes > 0)  # its credit is taken until this channel says otherwise
    engine.make("u0", [1])
    channel.send(Delivered("u0", None))
    assert poll(lambda: responder.ids == [[1]])
    channel.send(ClientGone("u0"))
    assert poll(lambda: engine.cancelled == ["u0"])
    channel.close()


@pytest.mark.usefixtures("without_probes")
def test_a_detokenizer_may_connect_after_one_could_not(
    streams: Streams, engine: FakeEngine, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept, failed = Channel.accept, []

    def fail_once(listener: Any) -> Channel:
        channel = accept(listener)
        if not failed:
            failed.append(channel)
            channel.close()
            raise OSError("too many open files")
        return channel

    # The thread already waits in the real one; this is what it calls next.
    monkeypatch.setattr(Channel, "accept", fail_once)
    waiting = Channel.connect(streams.return_address)
    refused = Channel.connect(streams.return_address)
    assert poll(lambda: failed)
    returns = ReturnChannel(streams.return_address, SEAL)
    responder = submit(streams, tokenizer)
    engine.make("u0", [1])
    assert poll(lambda: responder.ids == [[1]])
    engine.make("u0", [2])
    returns.send(Delivered("u0", b"state"))
    assert poll(lambda: responder.ids == [[1], [2]])
    waiting.close()
    refused.close()


@pytest.mark.parametrize(
    "first", [ClientGone("u0"), Introduction.under(Seal(b"x" * 32, Purpose.RETURNS)), Introduction(b"")]
)
def test_nobody_is_listened_to_without_this_servers_introduction(
    streams: Streams, engine: FakeEngine, tokenizer: Tokenizer, first: Message
) -> None:
    submit(streams, tokenizer)
    stranger, own = Channel.connect(streams.return_address), introduced(streams)
    stranger.send(first)
    with pytest.raises(ChannelClosed):
        stranger.receive()  # it has been hung up on
    assert engine.cancelled == []
    own.send(ClientGone("u0"))
    assert poll(lambda: engine.cancelled == ["u0"])
    own.close()


@pytest.mark.usefixtures("without_probes")
def test_after_a_failure_of_the_detokenizer_only_the_end_is_sent(
    streams: Streams, engine: FakeEngine, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    responder = submit(streams, tokenizer)
    engine.make("u0", [1])
    assert poll(lambda: responder.ids == [[1]])
    channel = introduced(streams)
    channel.send(DecodingFailed("u0", "KeyError: 7"))
    assert poll(lambda: engine.cancelled == ["u0"])
    assert "the detokenizer failed on request u0: KeyError: 7" in caplog.text
    channel.close()
    engine.make("u0", [2])
    engine.make("u0", [], FinishReason.CANCELLED)
    assert poll(lambda: responder.ids == [[1], [2]])
    assert poll(lambda: streams._streams == {})


@pytest.mark.usefixtures("without_probes")
def test_chunks_that_nobody_acknowledges_hold_others_up_for_a_moment_only(
    streams: Streams, engine: FakeEngine, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A detokenizer that stands still has 48 chunks, and the other one could go on."""
    monkeypatch.setattr(send_queue_module, "MAX_IN_FLIGHT", 2)
    monkeypatch.setattr(send_queue_module, "OVERDUE_SECONDS", 0.1)
    stuck = [submit(streams, tokenizer) for _ in range(2)]
    going = submit(streams, tokenizer)
    for number, responder in enumerate([*stuck, going]):
        engine.make(f"u{number}", [1])
        assert poll(lambda responder=responder: responder.ids == [[1]])
    returns = ReturnChannel(streams.return_address, SEAL)
    for token in (2, 3, 4):
        engine.make("u2", [token])
        returns.send(Delivered("u2", None))
        assert poll(lambda token=token: going.ids[-1] == [token])
    assert [responder.ids for responder in stuck] == [[[1]], [[1]]], "each has its one chunk in flight"
