# SPDX-License-Identifier: Apache-2.0
"""mkdocs' hooks: the site also has pages that lie outside docs/, and every file of the repository that a page links to.

Pages link to files by their place in the repository, so that the links work where the repository is shown. Here each
link out of a page gets the place that its target has in the site.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
# Files of the repository, and the pages that they are in the site.
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "client/README.md": "client_package.md",
    "findings/README.md": "findings.md",
    "perf/README.md": "measuring.md",
    "perf/RESULTS.md": "results.md",
}
SOURCES = {page: source for source, page in PAGES.items()}
LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\[\]]*\])*\])\(([^()\s:#]+)(#[^()\s]*)?\)")
LEADING_COMMENTS = re.compile(r"\A(?:<!--.*?-->\s*)+")
FENCE = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)


# Where the theme would load mermaid from, and a stand-in for browsers before 2020.
CDN = re.compile(r"https://unpkg\.com/[\w@./-]+")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie outside docs/."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point the links at the site's pages and files, and add the files; the title is the first thing of a page."""
    markdown = LEADING_COMMENTS.sub("", markdown)
    here = page.file.src_uri
    folder = posixpath.dirname(SOURCES.get(here, f"docs/{here}"))

    def moved(link: re.Match[str]) -> str:
        text, target, anchor = link[1], link[2], link[3] or ""
        path = posixpath.normpath(posixpath.join(folder, target))
        if not (ROOT / path).exists():
            return link[0]  # mkdocs warns of it
        if (ROOT / path).is_dir():
            return text[1:-1]  # the site has no folders to look into
        place = PAGES.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else f"files/{path}")
        if files.get_file_from_path(place) is None:
            files.append(File.generated(config, place, abs_src_path=str(ROOT / path)))
        return f"{text}({posixpath.relpath(place, posixpath.dirname(here) or '.')}{anchor})"

    # Code stays as it is.
    parts, end = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [LINK.sub(moved, markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, LINK.sub(moved, markdown[end:])])


def on_post_build(config: MkDocsConfig) -> None:
    """Take the content delivery network out of the theme's script. No page has a diagram of mermaid."""
    for script in Path(config.site_dir).glob("assets/javascripts/bundle.*.js"):
        script.write_text(CDN.sub("", script.read_text(encoding="utf-8")), encoding="utf-8")
