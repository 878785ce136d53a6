# SPDX-License-Identifier: Apache-2.0
"""The reasoning of a message is told from its content, however the text is cut."""

import pytest
from hypothesis import given, settings

from lightllm_backend.front.chat.reasoning import ThinkParser
from tests.front.chat.cuts import PLACES, check_cuts, texts_of

CASES = [
    ("no reasoning", False, " Hello <think>", " Hello <think>", ""),
    ("reasoning and content", False, "\n<think>\nSo, a < b.\n\n</think>\n\n  Yes.\n", "  Yes.\n", "So, a < b."),
    ("the prompt ends with <think>", True, "\nSo.\n</think>\n\nYes.", "Yes.", "So."),
    ("the model repeats <think>", True, "\n<think>\nSo.</think>Yes.", "Yes.", "So."),
    (
        "<think> within both",
        False,
        "<think>a <think> b</think>c <think> d</think>",
        "c <think> d</think>",
        "a <think> b",
    ),
    ("empty reasoning", False, "<think>\n\n</think>\n\nYes.", "Yes.", ""),
    ("cut off within the reasoning", False, "<think>So </thi", "", "So </thi"),
    ("cut off within the tag", False, "<thi", "<thi", ""),
    ("cut off after the reasoning", True, "So.</think>\n", "", "So."),
    ("nothing", False, "", "", ""),
]


@pytest.mark.parametrize(("begins_inside", "text", "content", "reasoning"), [case[1:] for case in CASES])
def test_cases(begins_inside: bool, text: str, content: str, reasoning: str) -> None:
    assert check_cuts(lambda: ThinkParser(begins_inside), text, []) == (content, reasoning, [])


@settings(max_examples=80)
@given(text=texts_of("<think>", "</think>", "<thi", "nk>", "</", "a b", "\n", " ", "é"), places=PLACES)
@pytest.mark.parametrize("begins_inside", [False, True])
def test_cuts_change_nothing(begins_inside: bool, text: str, places: list[int]) -> None:
    check_cuts(lambda: ThinkParser(begins_inside), text, places)
