# SPDX-License-Identifier: Apache-2.0
"""The detokenizer's words reach whoever listens at the address now."""

from pathlib import Path

from lightllm_backend.messages.channel import DELIVERED, FAILED, GONE, Channel, listen
from lightllm_backend.messages.return_channel import ReturnChannel


def test_words_arrive_in_order(tmp_path: Path) -> None:
    listener = listen(str(tmp_path / "returns"))
    returns = ReturnChannel()
    returns.connect(str(tmp_path / "returns"))
    returns.delivered("a", ["state"])
    returns.gone("b")
    returns.failed("c", "why")
    channel = Channel.accept(listener)
    assert [channel.receive() for _ in range(3)] == [
        [DELIVERED, "a", ["state"]],
        [GONE, "b"],
        [FAILED, "c", "why"],
    ]
    listener.close()


def test_a_listener_that_came_anew_gets_the_next_word(tmp_path: Path) -> None:
    address = str(tmp_path / "returns")
    first = listen(address)
    returns = ReturnChannel()
    returns.connect(address)
    returns.delivered("a", ["state"])
    old = Channel.accept(first)
    old.receive()
    old.close()
    first.close()
    second = listen(address)
    returns.connect(address)
    returns.delivered("b", None)
    assert Channel.accept(second).receive() == [DELIVERED, "b", None]
    second.close()


def test_nobody_at_the_address_is_no_error(tmp_path: Path) -> None:
    returns = ReturnChannel()
    returns.connect(str(tmp_path / "nobody"))
    returns.delivered("a", ["state"])
