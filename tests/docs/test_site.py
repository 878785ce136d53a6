# SPDX-License-Identifier: Apache-2.0
"""The documentation's site: it builds without a warning, a browser loads nothing of it from another host, and its
pictures are as the script draws them."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config

from docs.site.hooks import PAGES
from docs.site.pictures import CAPACITY, IMAGES, PICTURES, RUNNING, WAITING, demand
from lightllm_backend.config import EngineConfig
from lightllm_backend.option_table import OPTIONS
from tests.docs.snippets import ROOT, blocks, pages

# What a browser loads by itself, and does not wait for a click to follow.
LOADED = {
    ("script", "src"), ("link", "href"), ("img", "src"), ("img", "srcset"), ("source", "src"), ("source", "srcset"),
    ("iframe", "src"), ("video", "src"), ("audio", "src"), ("object", "data"), ("embed", "src"), ("image", "href"),
    ("use", "href"),
}  # fmt: skip


class Loads(HTMLParser):
    """Collects what a page loads, and its policy."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.policy = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attributes if (tag, name) in LOADED]
        found = dict(attributes)
        if found.get("http-equiv") == "Content-Security-Policy":
            self.policy = found["content"] or ""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as ./build.sh docs builds it: a warning is an error."""
    directory = tmp_path_factory.mktemp("site")
    config = load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(directory))
    config.plugins.on_startup(command="build", dirty=False)
    build(config)
    return directory


def made_of(page: str, site: Path) -> Path:
    return (site / (PAGES.get(page) or page.removeprefix("docs/"))).with_suffix(".html")


def test_every_page_is_built_and_forbids_the_browser_other_hosts(site: Path) -> None:
    for page in pages():
        loads = Loads()
        loads.feed(made_of(page, site).read_text(encoding="utf-8"))
        assert loads.policy.startswith("default-src 'self'"), page
        assert "//" not in loads.policy
        assert len(loads.addresses) > 3, page


def test_a_browser_loads_nothing_from_other_hosts(site: Path) -> None:
    for page in site.rglob("*.html"):
        loads = Loads()
        loads.feed(page.read_text(encoding="utf-8"))
        assert [address for address in loads.addresses if re.match(r"(\w+:)?//", address)] == [], page.name
    for style in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", style.read_text(encoding="utf-8")), style.name
    for picture in site.rglob("*.svg"):
        assert not re.search(r"(href|src)=[\"'](https?:)?//", picture.read_text(encoding="utf-8")), picture.name


def test_scripts_load_nothing_from_other_hosts(site: Path) -> None:
    """They name only those that tell how many stars a repository has, and no page names a repository."""
    quoted = re.compile(r"[\"'`]https?://(?!www\.w3\.org/)([^\"'`\s/]+)")
    hosts = set()
    for script in site.rglob("*.js"):
        code = re.sub(r"/\*.*?\*/", "", script.read_text(encoding="utf-8"), flags=re.DOTALL)
        hosts |= set(quoted.findall(code))
    assert hosts == {"api.github.com", "${e}"}
    assert not [page for page in site.rglob("*.html") if 'data-md-component="source"' in page.read_text("utf-8")]


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_as_the_script_draws_it(name: str) -> None:
    assert (IMAGES / name).read_text(encoding="utf-8") == PICTURES[name]().svg(), "run python docs/site/pictures.py"


def test_diagrams_are_pictures() -> None:
    """Mermaid would come from another host."""
    assert [str(block) for page in pages() for block in blocks(page) if block.language == "mermaid"] == []


def test_the_words_below_the_picture_of_the_peak_are_true() -> None:
    text = (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8")
    peak, higher = (max(sum(step.values()) for step in demand(held)) for held in (RUNNING, RUNNING | WAITING))
    assert f"never hold more than {peak} of the {CAPACITY} slots together" in text
    assert f"each counted at its longest would make {sum(map(sum, RUNNING.values()))}" in text
    assert f"with it the peak would be {higher}" in text


def test_readme_and_the_page_on_models_name_the_same_models() -> None:
    families = re.compile(r"^BLOOM, .* and SmolLM3", re.MULTILINE)
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert families.findall(page) == families.findall((ROOT / "README.md").read_text(encoding="utf-8")) != []


def test_what_people_move_to_exists() -> None:
    """Settings, options and metrics in the last column of the tables of docs/moving_here.md."""
    text = (ROOT / "docs" / "moving_here.md").read_text(encoding="utf-8")
    cells = [line.strip("| ").split(" | ")[-1] for line in text.splitlines() if line.startswith("| ")]
    names = {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}
    flags = {name[2:].split()[0] for name in names if name.startswith("--")}
    assert flags <= set(EngineConfig.__dataclass_fields__)
    metrics = {metric for name in names for metric in re.findall(r"lightllm_(\w+)", name)}
    monitoring = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
    assert metrics <= set(re.findall(r"^\| `lightllm_(\w+)` \|", monitoring, re.MULTILINE))
    others = {name for option in OPTIONS.values() for name in option.other_names}
    rest = {name for name in names if re.fullmatch(r"[a-z_]+", name)} - {"ensemble", "status", "stream"} - metrics
    assert {name for name in rest if not name.startswith("lightllm_")} <= {*OPTIONS, *others}
    assert len(flags) > 20
    assert len(metrics) > 8
