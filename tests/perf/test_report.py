# SPDX-License-Identifier: Apache-2.0
"""perf/RESULTS.md against the stored results that it is written from, and the links of both pages of perf/."""

import re
from pathlib import Path

import pytest

from perf.report.__main__ import INTRODUCTION, PAGE, page, stored_results

PERF = PAGE.parent


def test_the_page_is_the_one_that_the_command_writes() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(stored_results()), "run python -m perf.report"


def test_a_note_and_a_plot_follow_their_result(tmp_path: Path) -> None:
    (tmp_path / "load.svg").touch()
    result = {
        "benchmark": "load_time", "model": "tiny", "note": "A quiet machine.", "checkpoint_bytes": 1e9,
        "rows": [{"seconds": 2.0, "host_peak_bytes": 2**30}], "commit": "abc", "date": "2026-11-29T00:00",
        "versions": {"torch": "2.11.0", "triton": None}, "machine": {"gpu": None, "cpu": "a CPU", "cores": 2},
    }  # fmt: skip
    text = page({tmp_path / "load.json": result})
    assert text.startswith(INTRODUCTION)
    lines = text.removeprefix(INTRODUCTION).splitlines()
    origin = "a CPU, 2 cores, torch 2.11.0, commit abc, 2026-11-29"
    assert lines[0] == f"**Weights of tiny from safetensors in the page cache** ({origin}):"
    assert lines[-5:] == ["| 1.0 GB | 2.0 | 1.00 |", "", "A quiet machine.", "", "![load_time tiny](results/load.svg)"]


@pytest.mark.parametrize("name", ["README.md", "RESULTS.md"])
def test_links_lead_to_files(name: str) -> None:
    targets = re.findall(r"\]\(([^)#:]+)[^)]*\)", (PERF / name).read_text(encoding="utf-8"))
    assert targets
    assert [target for target in targets if not (PERF / target).exists()] == []
