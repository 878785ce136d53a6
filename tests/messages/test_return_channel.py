# SPDX-License-Identifier: Apache-2.0
"""The detokenizer's messages reach the process that listens at the address now."""

from pathlib import Path

from lightllm_backend.messages.channel import Channel, listen
from lightllm_backend.messages.return_channel import ReturnChannel
from lightllm_backend.messages.return_messages import ClientGone, DecodingFailed, Delivered


def test_messages_arrive_in_order(tmp_path: Path) -> None:
    listener = listen(str(tmp_path / "returns"))
    returns = ReturnChannel()
    returns.connect(str(tmp_path / "returns"))
    returns.send(Delivered("a", "state"))
    returns.send(ClientGone("b"))
    returns.send(DecodingFailed("c", "why"))
    channel = Channel.accept(listener)
    assert [channel.receive() for _ in range(3)] == [
        Delivered("a", "state"),
        ClientGone("b"),
        DecodingFailed("c", "why"),
    ]
    listener.close()


def test_a_listener_that_came_anew_gets_the_next_message(tmp_path: Path) -> None:
    address = str(tmp_path / "returns")
    first = listen(address)
    returns = ReturnChannel()
    returns.connect(address)
    returns.send(Delivered("a", "state"))
    old = Channel.accept(first)
    old.receive()
    old.close()
    first.close()
    second = listen(address)
    returns.connect(address)
    returns.send(Delivered("b", None))
    assert Channel.accept(second).receive() == Delivered("b", None)
    second.close()


def test_a_generation_step_that_stands_still_holds_no_detokenizer_up(tmp_path: Path) -> None:
    listener = listen(str(tmp_path / "returns"))
    returns = ReturnChannel()
    returns.connect(str(tmp_path / "returns"))
    messages = [Delivered(str(number), "state" * 1000) for number in range(500)]
    for message in messages:
        returns.send(message)  # ten times what a socket holds, and nobody reads
    channel = Channel.accept(listener)
    assert [channel.receive() for _ in messages] == messages
    listener.close()


def test_nobody_at_the_address_is_no_error(tmp_path: Path) -> None:
    returns = ReturnChannel()
    returns.connect(str(tmp_path / "nobody"))
    returns.send(Delivered("a", "state"))
