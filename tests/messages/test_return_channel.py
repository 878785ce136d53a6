# SPDX-License-Identifier: Apache-2.0
"""The detokenizer's messages reach the process that listens at the address now."""

from pathlib import Path
from typing import Any

import pytest

from lightllm_backend.messages.channel import Channel, Message, listen
from lightllm_backend.messages.return_channel import ReturnChannel
from lightllm_backend.messages.return_messages import ClientGone, DecodingFailed, Delivered, Introduction
from lightllm_backend.messages.seal import NotSealed, Purpose, Seal

SEAL = Seal(b"k" * 32, Purpose.RETURNS)


def test_messages_arrive_in_order(tmp_path: Path) -> None:
    listener = listen(str(tmp_path / "returns"))
    returns = ReturnChannel(str(tmp_path / "returns"), SEAL)
    returns.send(Delivered("a", b"state"))
    returns.send(ClientGone("b"))
    returns.send(DecodingFailed("c", "why"))
    channel = Channel.accept(listener)
    introduction = channel.receive()
    assert isinstance(introduction, Introduction)
    introduction.check(SEAL)
    assert [channel.receive() for _ in range(3)] == [
        Delivered("a", b"state"),
        ClientGone("b"),
        DecodingFailed("c", "why"),
    ]
    listener.close()


def test_a_listener_that_came_anew_gets_the_next_message(tmp_path: Path) -> None:
    address = str(tmp_path / "returns")
    first = listen(address)
    returns = ReturnChannel(address, SEAL)
    returns.send(Delivered("a", b"state"))
    old = Channel.accept(first)
    assert [type(old.receive()) for _ in range(2)] == [Introduction, Delivered]
    old.close()
    first.close()
    second = listen(address)
    returns.send(Delivered("b", None))
    anew = Channel.accept(second)
    assert [anew.receive() for _ in range(2)] == [Introduction.under(SEAL), Delivered("b", None)]
    second.close()


def test_a_generation_step_that_stands_still_holds_no_detokenizer_up(tmp_path: Path) -> None:
    listener = listen(str(tmp_path / "returns"))
    returns = ReturnChannel(str(tmp_path / "returns"), SEAL)
    messages = [Delivered(str(number), b"state" * 1000) for number in range(500)]
    for message in messages:
        returns.send(message)  # ten times what a socket holds, and nobody reads
    channel = Channel.accept(listener)
    assert channel.receive() == Introduction.under(SEAL)
    assert [channel.receive() for _ in messages] == messages
    listener.close()


def test_nobody_at_the_address_is_no_error(tmp_path: Path) -> None:
    returns = ReturnChannel(str(tmp_path / "nobody"), SEAL)
    returns.send(Delivered("a", b"state"))


def test_an_introduction_under_another_key_or_for_another_purpose_is_none() -> None:
    for stranger in (Seal(b"x" * 32, Purpose.RETURNS), Seal(b"k" * 32, Purpose.CHUNK)):
        with pytest.raises(NotSealed):
            Introduction.under(stranger).check(SEAL)


@pytest.mark.parametrize(
    ("message", "packed"),
    [
        (Introduction, ("text",)),
        (Delivered, (7, None)),
        (Delivered, ("u", "text")),
        (Delivered, ("u",)),
        (ClientGone, (["u"],)),
        (DecodingFailed, ("u", None)),
        (DecodingFailed, ("u", "why", "more")),
    ],
)
def test_a_message_of_other_types_is_refused(message: type[Message], packed: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match="are not the types of such a message"):
        message.unpack(*packed)
