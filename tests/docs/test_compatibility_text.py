# SPDX-License-Identifier: Apache-2.0
"""docs/compatibility.md, the parts on tokenizers, text and chat templates, against the code."""

import json
import re
from pathlib import Path

import pytest

from lightllm_backend.text.text_stream import TextStream
from lightllm_backend.text.tokenizer import Tokenizer
from lightllm_backend.text.tokenizer_settings import TokenizerSettings
from lightllm_client.chat import ChatTemplate

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/compatibility.md").read_text()
LLAMA = Tokenizer.load(ROOT / "tests/data/llama")
IDS = {LLAMA.token(token_id): token_id for token_id in range(LLAMA.vocab_size)}


def table(section: str, first_header: str) -> list[list[str]]:
    """The rows of a section's table whose first header this is."""
    _, _, text = PAGE.partition(f"## {section}\n")
    rows = []
    lines = iter(text.partition("\n## ")[0].splitlines())
    for line in lines:
        if line.startswith(f"| {first_header} |"):
            next(lines)
            for row in lines:
                if not row.startswith("|"):
                    break
                rows.append([cell.strip() for cell in row.strip("|").split(" | ")])
    assert rows, (section, first_header)
    return rows


def unquoted(cell: str) -> str:
    return cell.strip("`")


def ids_of(cell: str) -> list[int]:
    return [IDS[token] for token in unquoted(cell).split()]


@pytest.mark.parametrize("row", table("Text", "prompt"), ids="|".join)
def test_an_answer_s_text_is_as_the_page_has_it(row: list[str]) -> None:
    prompt, skip, answer, text = row
    stream = TextStream(LLAMA, skip_special_tokens=skip == "true", prompt_ids=ids_of(prompt))
    assert stream.push(ids_of(answer)) + stream.flush() == json.loads(unquoted(text))


@pytest.mark.parametrize("row", table("Text", "stop string"), ids="|".join)
def test_a_stop_string_is_found_as_the_page_has_it(row: list[str]) -> None:
    stop, answer, text, taken = row
    stream = TextStream(LLAMA, [unquoted(stop)], prompt_ids=ids_of("`<s> ▁the`"))
    assert stream.push(ids_of(answer)) == json.loads(unquoted(text))
    assert (stream.stopped, stream.num_tokens) == (True, int(taken))


@pytest.mark.parametrize("row", table("Tokenizers", "what names the token"), ids=lambda row: row[0])
def test_flags_that_are_not_said_are_as_the_page_has_them(row: list[str], tmp_path: Path) -> None:
    names = re.findall(r"`([a-z_.]+)`", row[0])
    normalized = {"false": lambda special: False, "the opposite of `special`": lambda special: not special}[row[3]]
    if "added_tokens_decoder" in names:
        added = {"7": {"content": "<a>", "special": True}, "8": {"content": "<b>"}}
        files = {"tokenizer_config.json": {"added_tokens_decoder": added}}
    elif "added_tokens.json" in names:
        files = {"added_tokens.json": {"<a>": 7, "<b>": 8}, "tokenizer_config.json": {"pad_token": "<a>"}}
    elif "special_tokens_map.json" in names:
        files = {"special_tokens_map.json": {"pad_token": "<a>"}}
    else:
        values = {name: ["<a>"] if name.endswith("tokens") else "<a>" for name in (*names[:1], *names[-2:])}
        files = {"tokenizer_config.json": values}
        assert names[-2:] == ["additional_special_tokens", "extra_special_tokens"]
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    settings = TokenizerSettings.read(tmp_path)
    tokens = list(settings.added_tokens.values() or settings.special_tokens.values())
    assert tokens[0][:2] == ("<a>", True)
    for token in tokens:
        assert token.normalized is normalized(token.special)
        assert (token.single_word, token.lstrip, token.rstrip) == (False, False, False)


def test_a_template_sees_the_names_of_the_page() -> None:
    names = [unquoted(name) for name, _ in table("Chat templates", "name")]
    template = ChatTemplate("".join(f"{{{{ {name} is defined }}}}" for name in names), {"bos_token": "<s>"})
    assert template.render([], enable_thinking=True) == "True" * len(names)
    optional = [
        unquoted(name) for name, value in table("Chat templates", "name") if value.endswith("none unless given")
    ]
    assert optional == ["tools", "documents"]
    assert ChatTemplate("{{ tools is none and documents is none }}", {}).render([]) == "True"


def test_templates_are_looked_for_in_the_order_of_the_page(tmp_path: Path) -> None:
    files = [re.findall(r"`([^`]+)`", row[0])[0] for row in table("Chat templates", "file")]
    for name in reversed(files):
        content = name if name.endswith(".jinja") else json.dumps({"chat_template": name})
        (tmp_path / name).write_text(content)
        assert ChatTemplate.load(tmp_path).render([]) == name


@pytest.mark.parametrize(
    "row",
    [row for row in table("Where we differ from transformers on purpose", "case") if "::" in row[-1]],
    ids=lambda row: row[0],
)
def test_a_difference_has_a_test(row: list[str]) -> None:
    file, _, name = unquoted(row[-1]).partition("::")
    assert f"def {name}(" in (ROOT / file).read_text()
