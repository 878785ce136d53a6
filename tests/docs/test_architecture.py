# SPDX-License-Identifier: Apache-2.0
"""The signposts against the tree: each file, function and link that a page names exists, and its figures are right."""

from __future__ import annotations

import ast
import json
import re
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

from lightllm_backend.kernels.linear.choice import Gpu, ProductKernel, choose_kernel
from lightllm_backend.router.admission import Forecast
from tests.docs.snippets import pages

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "lightllm_backend"
# docs/compatibility.md names files of other projects.
OTHERS = ("CHANGELOG", "client/", "docs/compatibility.md", "findings/", "perf/")
PAGES = [page for page in pages() if not page.startswith(OTHERS)]
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")

# `folder/file.py`, `folder/file.py:name`, `folder/`; NAME stands for any name.
MENTION = re.compile(r"`((?:[\w.-]+/)+(?:[\w.-]+\.(?:py|json|md|toml|pbtxt|csv|yml|yaml))?)(?::([\w.]+))?`")


def mentions(page: str) -> list[tuple[str, str]]:
    """Each path that the page has in backquotes, and the name behind its colon or nothing."""
    text = (ROOT / page).read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return sorted({(path, name or "") for path, name in MENTION.findall(prose)})


def files(path: str) -> list[Path]:
    """What a mentioned path means, seen from the root of the repository and from the package's folder."""
    pattern = path.rstrip("/").replace("NAME", "*")
    return [found for folder in (ROOT, PACKAGE) for found in folder.glob(pattern)]


@lru_cache
def names(path: Path) -> frozenset[str]:
    """What a module defines: `function`, `Class`, `Class.method`, `CONSTANT`."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return frozenset(found)


@pytest.mark.parametrize("page", PAGES)
def test_every_path_exists(page: str) -> None:
    assert [path for path, _ in mentions(page) if not files(path)] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_name_is_in_its_file(page: str) -> None:
    named = [(path, name) for path, name in mentions(page) if name and files(path)]
    assert [f"{path}:{name}" for path, name in named if not any(name in names(file) for file in files(path))] == []


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md"])
def test_every_link_leads_somewhere(page: str) -> None:
    here = ROOT / page
    wrong = []
    for link in re.findall(r"\]\(([^)\s]+)\)", here.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        target, _, anchor = link.partition("#")
        file = here.parent / target if target else here
        if not file.exists() or (anchor and anchor not in anchors(file)):
            wrong.append(link)
    assert wrong == []


def test_the_mentions_of_the_architecture_page_are_seen() -> None:
    assert len(mentions("docs/architecture.md")) > 100
    assert ("router/router.py", "Router.finish") in mentions("docs/architecture.md")


def test_the_example_of_the_router_s_rule() -> None:
    held, left = (
        re.findall(r"holds (\d+) and has (\d+)", ARCHITECTURE),
        re.search(r"D would hold (\d+) and has (\d+) left: the peak would be (\d+)", ARCHITECTURE),
    )
    assert left is not None
    assert len(held) == 3
    running = np.array([[int(number) for number in pair] for pair in held])
    forecast = Forecast(running[:, 0], running[:, 1])
    [peak] = re.findall(r"The peak is max\(.*\) = (\d+)", ARCHITECTURE)
    assert forecast.peak == int(peak)
    assert forecast.peak_with(int(left[1]), int(left[2])) == int(left[3])


def test_the_kernels_for_40_tokens() -> None:
    layer = [(12288, 4096, False), (4096, 4096, False), (22016, 4096, True), (4096, 11008, False)]
    head = (32000, 4096, False)
    h200, a100, v100 = Gpu((9, 0), 132, has_descriptors=True, has_gluon=True), Gpu((8, 0), 108), Gpu((7, 0), 80)

    def kernels(products: list[tuple[int, int, bool]], gpu: Gpu) -> set[ProductKernel]:
        return {choose_kernel(40, *product, has_bias=False, gpu=gpu).kernel for product in products}

    assert kernels(layer, h200) == {ProductKernel.PREFETCH}
    assert kernels([head], h200) == {ProductKernel.SPLITS}
    assert kernels([*layer, head], a100) == {ProductKernel.SPLITS}
    assert kernels([head], v100) == {ProductKernel.CUBLAS}


def test_the_figures_of_windows_are_those_that_are_stored() -> None:
    stored = json.loads((ROOT / "perf" / "results" / "window_slots.json").read_text(encoding="utf-8"))
    rows = {(row["model"], row["gives_back"]): row for row in stored["rows"]}
    mistral, gemma = ((rows[model, True], rows[model, False]) for model in ("Mistral 7B v0.1", "Gemma 3 12B"))

    def gib(row: dict, name: str) -> str:
        return f"{row[name] / 2**30:.2f}"

    ends = [[gib(row, "last_bytes") for row in model] for model in (mistral, gemma)]
    tokens = f"{stored['prompt'] + stored['output']:,} tokens"
    assert f"a sequence of {tokens} holds {ends[0][0]} GiB of the pool instead of {ends[0][1]}" in ARCHITECTURE
    assert f"and {ends[1][0]} instead of {ends[1][1]} with that of Gemma 3 12B" in ARCHITECTURE
    most = [gib(model[0], "most_bytes") for model in (mistral, gemma)]
    assert f"{stored['batch_max_tokens']:,} tokens a step, it is {most[0]} and {most[1]}" in ARCHITECTURE
    at_once = [f"{after['at_once']} instead of {before['at_once']}" for after, before in (mistral, gemma)]
    assert f"{at_once[0]} and {at_once[1]} run at once in {stored['pool_gib']} GiB" in ARCHITECTURE
    serving = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    assert f"{tokens} then hold {ends[0][0]} GiB instead of {ends[0][1]}" in serving


def test_the_glossary_has_26_words_in_order() -> None:
    glossary = ARCHITECTURE[ARCHITECTURE.index("## Glossary") :]
    words = [line.split("|")[1].strip() for line in glossary.splitlines() if line.startswith("| ")][2:]
    assert len(words) == 26
    assert words == sorted(words, key=str.lower)
