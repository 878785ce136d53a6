# SPDX-License-Identifier: Apache-2.0
"""The tables of request names in docs/compatibility.md against the table of options."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lightllm_backend.option_table import ALL_OPTIONS, CANONICAL, OPTIONS, OTHERS
from lightllm_backend.triton_server.tensors import BATCHED_ENSEMBLE, BATCHED_OUTPUT_NAMES, MODEL_TENSORS, PUBLIC_INPUTS

PAGE = (Path(__file__).parents[2] / "docs" / "compatibility.md").read_text()
SERVERS = ["LightLLM", "vllm_backend", "tensorrtllm_backend", "NVIDIA's OpenAI frontend and genai-perf"]


def section(title: str) -> str:
    [text] = re.findall(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", PAGE, flags=re.MULTILINE | re.DOTALL)
    return str(text)


def rows(title: str) -> list[list[str]]:
    """The cells of the section's table, without its head."""
    lines = [line for line in section(title).splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


NAMED = [(server, *cells) for server in SERVERS for cells in rows(server)]


@pytest.mark.parametrize(("server", "name", "tensor", "here"), NAMED, ids=[f"{one[0]} {one[1]}" for one in NAMED])
def test_a_name_is_taken_as_the_page_says(server: str, name: str, tensor: str, here: str) -> None:
    name = name.strip("`")
    kind, size = PUBLIC_INPUTS.get(name, ("", 0))
    assert tensor == (f"{kind} [{size}]" if kind else "–")
    canonical = CANONICAL.get(name)
    if canonical in OPTIONS:
        assert here.partition(":")[0] == f"`{canonical}`"
    elif canonical:
        assert here.startswith(ALL_OPTIONS[canonical].allowed)
    else:
        assert here == "a JSON object" if kind else here.startswith("not taken: ")


def test_every_name_is_on_the_page() -> None:
    named = {name.strip("`") for _, name, *_ in NAMED}
    assert not set(OTHERS) - named
    assert not {other for option in OTHERS.values() for other in option.other_names} - named
    for option in OPTIONS.values():
        assert not {*option.aliases, *option.keys} - named - {"stop_ids", "request_priority"}, (
            "each other name is somebody's"
        )


def test_the_models_are_those_that_clients_call() -> None:
    entries = {name for name, (inputs, _) in MODEL_TENSORS.items() if inputs is PUBLIC_INPUTS} - {"tokenizer"}
    assert [cells[0] for cells in rows("Which model a client calls")] == [
        f"`{name}`" for name in MODEL_TENSORS if name in entries
    ]
    for ours, theirs in BATCHED_OUTPUT_NAMES.items():
        assert f"but for `{ours}`, which is called `{theirs}`" in section("tensorrtllm_backend")
        assert theirs in MODEL_TENSORS[BATCHED_ENSEMBLE][1]
