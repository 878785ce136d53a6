# SPDX-License-Identifier: Apache-2.0
"""Each code block of the documentation is run by a test or says why not, and its settings and files exist."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

import pytest

from lightllm_backend.config import ENVIRONMENT_PREFIX, EngineConfig
from lightllm_backend.serve import command as serve
from tests.docs.snippets import LANGUAGES_THAT_RUN, PROGRAMS, ROOT, SHELLS, Block, blocks, matches, pages
from tests.docs.test_architecture import names

BLOCKS = [block for page in pages() for block in blocks(page)]
THAT_RUN = [block for block in BLOCKS if block.language in LANGUAGES_THAT_RUN]


def test_every_block_names_its_language() -> None:
    assert len(THAT_RUN) > 50
    assert [str(block) for block in BLOCKS if not block.language] == []


def test_a_block_that_is_not_run_says_why() -> None:
    assert [str(block) for block in THAT_RUN if block.way == "not run:" and len(block.word.split()) < 2] == []


def test_a_block_that_another_test_runs_names_it() -> None:
    wrong = []
    for block in THAT_RUN:
        if block.way == "run by":
            path, _, name = block.word.partition("::")
            if not (ROOT / path).is_file() or (name and name not in names(ROOT / path)):
                wrong.append(str(block))
    assert wrong == []


def test_the_others_run_beside_a_server() -> None:
    """Their commands are those that tests/e2e/test_e2e_snippets.py may start."""
    wrong = [
        f"{block}: {command}"
        for block in THAT_RUN
        if block.language in SHELLS and not block.way
        for command, _ in block.commands
        if command.split()[0] not in PROGRAMS
    ]
    assert wrong == [], "say above the block who runs it, or why nobody does: tests/docs/snippets.py"


# What takes the settings of the launch command.
STARTS = (
    ["./build.sh", "serve"],
    ["python", "-m", "lightllm_backend.serve"],
    ["python", "-m", "lightllm_backend.worker"],
)


def all_commands() -> Iterator[tuple[Block, list[str]]]:
    for block in THAT_RUN:
        if block.language in SHELLS:
            for command, _ in block.commands:
                yield block, shlex.split(command.replace("\\\n", " "), comments=True)


def settings(words: list[str]) -> list[str] | None:
    """What a command gives to the launch command, or None if it does not start it."""
    for start in STARTS:
        if words[: len(start)] == start:
            return words[len(start) :]
    if words[:2] == ["docker", "run"] and "lightllm_backend" in words and "--entrypoint" not in words:
        return words[words.index("lightllm_backend") + 1 :]
    return None


def test_the_settings_of_every_server_are_allowed() -> None:
    found = [(block, given) for block, words in all_commands() if (given := settings(words)) is not None]
    assert len(found) > 10
    for block, given in found:
        context = serve.make_context(str(block), list(given))
        fields = EngineConfig.__dataclass_fields__
        chosen = {name: value for name, value in context.params.items() if name in fields and value is not None}
        EngineConfig.build({}, {ENVIRONMENT_PREFIX + name.upper(): value for name, value in chosen.items()})


def test_the_modules_and_files_of_every_command_exist() -> None:
    for block, words in all_commands():
        if words[1:2] == ["-m"] and words[0] == "python" and words[2] != "pytest":
            module = ROOT / words[2].replace(".", "/")
            assert module.is_dir() or module.with_suffix(".py").is_file(), f"{block}: {words[2]}"
        if words[:3] == ["python", "-m", "pytest"]:
            assert [word for word in words if word.startswith("tests/") and not (ROOT / word).exists()] == [], block
        if words[:1] == ["./build.sh"]:
            assert f"\n{words[1]}() {{" in (ROOT / "build.sh").read_text(encoding="utf-8"), f"{block}: {words[1]}"


@pytest.mark.parametrize(
    ("output", "expected", "same"),
    [("a\n", "a", True), ('{"x": 1, "y": 2}', '{…"y": 2}', True), ("ab", "a", False), ("a.c", "abc", False)],
)
def test_an_output_is_compared_with_the_page_s(output: str, expected: str, same: bool) -> None:
    assert matches(output, expected) is same
