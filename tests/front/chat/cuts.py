# SPDX-License-Identifier: Apache-2.0
"""Feeds parsers of messages with text that is cut anywhere."""

from collections.abc import Callable, Iterable

from hypothesis import strategies as st

from lightllm_backend.front.chat.deltas import DeltaParser, Message


def parse(parser: DeltaParser, pieces: Iterable[str]) -> tuple[str, str, list[tuple[str, str]]]:
    """The content, the reasoning and the calls (name and arguments) of a message that comes in these pieces."""
    deltas = [delta for piece in pieces for delta in parser.feed(piece)] + parser.finish()
    message = Message.join(deltas)
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.tool_calls or []]
    return message.content, message.reasoning_content, calls


def cut(text: str, places: Iterable[int]) -> list[str]:
    ends = [*sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def texts_of(*pieces: str) -> st.SearchStrategy[str]:
    """Texts of pieces that mean something to a parser, in any order."""
    return st.lists(st.sampled_from(pieces), max_size=12).map("".join)


PLACES = st.lists(st.integers(0, 10_000), max_size=8)


def check_cuts(make: Callable[[], DeltaParser], text: str, places: list[int]) -> tuple[str, str, list[tuple[str, str]]]:
    """Check that neither these cuts nor single characters change the message; return it."""
    whole = parse(make(), [text])
    assert parse(make(), cut(text, places)) == whole
    assert parse(make(), text) == whole
    return whole
