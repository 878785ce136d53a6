# SPDX-License-Identifier: Apache-2.0
"""docs/compatibility.md on model directories, against the code: names, defaults, dtypes, files, ignored tensors."""

from __future__ import annotations

import json
import re
from pathlib import Path

from lightllm_backend.models import bloom, llama
from lightllm_backend.models.find_weights import NOT_THE_MODEL, USUAL
from lightllm_backend.models.model_config import DTYPES
from lightllm_backend.models.registry import ARCHITECTURES, FORMER_NAMES
from lightllm_backend.models.rope import ROPE_KEYS
from lightllm_backend.models.unsupported import FIXED_KEYS, QUANTIZED_TENSORS
from lightllm_backend.models.weight_files import FLOATS

PAGE = (Path(__file__).parents[2] / "docs" / "compatibility.md").read_text(encoding="utf-8")
NAMES = {
    "LLaMA": "LlamaForCausalLM",
    "EXAONE 4": "Exaone4ForCausalLM",
    "Granite": "GraniteForCausalLM",
    "InternLM3": "InternLM3ForCausalLM",
    "Ministral": "MinistralForCausalLM",
    "Mistral": "MistralForCausalLM",
    "OLMo 2": "Olmo2ForCausalLM",
    "Phi-3": "Phi3ForCausalLM",
    "Qwen2": "Qwen2ForCausalLM",
    "Qwen3": "Qwen3ForCausalLM",
    "Gemma 2": "Gemma2ForCausalLM",
    "Gemma 3": "Gemma3ForCausalLM",
    "Seed-OSS": "SeedOssForCausalLM",
    "SmolLM3": "SmolLM3ForCausalLM",
    "BLOOM": "BloomForCausalLM",
}


def table(*columns: str) -> list[dict[str, str]]:
    """The rows of the one table with these columns, by the columns' names."""
    lines = PAGE.splitlines()
    (start,) = (number for number, line in enumerate(lines) if line == f"| {' | '.join(columns)} |")
    rows = []
    for line in [lines[start], *lines[start + 2 :]]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]


def words(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def test_models_and_their_names() -> None:
    expected = [
        (name, [former for former, now in FORMER_NAMES.items() if now == name], entry.module)
        for name, entry in ARCHITECTURES.items()
    ]
    rows = table("`architectures`", "also called", "`model_type`")
    stated = []
    for row in rows:
        former = [name for name in words(row["also called"]) if name in FORMER_NAMES]
        stated.append((*words(row["`architectures`"]), former, *words(row["`model_type`"])))
    assert stated == expected


def readers(text: str) -> set[str]:
    """The models that a cell names: some, `all`, or `all but` some."""
    rest = text.removeprefix("all but ")
    named = set() if text == "all" else set(rest.split(", "))
    assert named <= NAMES.keys()
    return NAMES.keys() - named if text.startswith("all") else named


def test_the_keys_of_each_class() -> None:
    same = {"Gemma3ForConditionalGeneration": "Gemma3ForCausalLM"}
    assert {*NAMES.values(), *same} == ARCHITECTURES.keys()
    assert all(ARCHITECTURES[one].defaults == ARCHITECTURES[other].defaults for one, other in same.items())
    stated = {words(row["key"])[0]: readers(row["read for"]) for row in table("key", "read for")}
    keys = dict.fromkeys(key for name in NAMES.values() for key in ARCHITECTURES[name].defaults)
    assert stated == {
        key: {name for name, architecture in NAMES.items() if key in ARCHITECTURES[architecture].defaults}
        for key in keys
    }


def test_keys_with_one_meaning() -> None:
    allowed = {key: row["allowed"] for row in table("key", "allowed") for key in words(row["key"])}
    assert allowed == {key: ", ".join(json.dumps(value) for value in values) for key, values in FIXED_KEYS.items()}


def test_words_for_dtypes() -> None:
    assert {word: row["served in"] for row in table("word", "served in") for word in words(row["word"])} == DTYPES


def test_rope_types() -> None:
    assert {words(row["type"])[0]: tuple(words(row["reads"])) for row in table("type", "reads")} == ROPE_KEYS


def test_weight_files() -> None:
    (section,) = (part for part in PAGE.split("\n## ") if part.startswith("Weight files\n"))
    listed = re.findall(r"^\d\. (.*)$", section, re.MULTILINE)
    order = [name for usual in USUAL for name in (usual, f"{usual}.index.json")]
    assert [words(line)[0] for line in listed[:4]] == order
    (left_out,) = (line for line in section.splitlines() if line.startswith("Steps 5 and 6 leave out"))
    assert tuple(words(left_out)) == NOT_THE_MODEL
    (dtypes,) = re.findall(r"Weights may be (.*)\. The names", section)
    assert tuple(re.split(", | or ", dtypes)) == FLOATS


def test_ignored_tensors() -> None:
    ends = {row["model"]: tuple(words(row["names that end in"])) for row in table("model", "names that end in")}
    assert ends == {"all but BLOOM": llama.OLD_BUFFERS, "BLOOM": (bloom.OLD_BUFFER,)}


def test_signs_of_quantisation() -> None:
    (row,) = (row for row in table("found", "recognised by") if row["found"].startswith("a quantised checkpoint"))
    for tool in QUANTIZED_TENSORS:
        assert tool == "scales" or all(name in row["recognised by"] for name in tool.split(" or "))
