# SPDX-License-Identifier: Apache-2.0
"""The documentation's generated tables against the code that they describe."""

from dataclasses import fields
from pathlib import Path

import pytest

from lightllm_backend.config import EngineConfig
from lightllm_backend.doc_tables import COMMAND, DOCS, TABLES, updated
from lightllm_backend.option_table import OPTIONS
from lightllm_backend.triton_server.metric_table import METRICS, PREFIX
from lightllm_backend.triton_server.tensors import PUBLIC_OUTPUTS


def rows_with(page: str, *cells: str) -> list[str]:
    lines = (DOCS / page).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.startswith("|") and all(cell in line for cell in cells)]


@pytest.mark.parametrize("page", TABLES, ids=lambda page: page.name)
def test_a_page_is_as_the_command_writes_it(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert updated(page, text) == text, f"run {COMMAND}"


@pytest.mark.parametrize("comment", ["<!-- settings:", "<!-- end of settings -->"])
def test_a_page_without_a_place_for_its_table_is_refused(comment: str) -> None:
    page = DOCS / "settings.md"
    with pytest.raises(ValueError, match=r"settings\.md has no table between"):
        updated(page, page.read_text(encoding="utf-8").replace(comment, ""))


def test_every_setting_has_a_row() -> None:
    for setting in fields(EngineConfig):
        assert len(rows_with("settings.md", f"| `{setting.name}` |")) == 1, setting.name


def test_every_option_has_a_row_with_its_tensor_and_other_names() -> None:
    for name, option in OPTIONS.items():
        assert option.help, name
        tensor = "| {} [{}] |".format(*option.tensor) if option.tensor else "| – |"
        [row] = rows_with("request_options.md", f"| `{name}` |", tensor)
        assert all(f"`{other}`" in row for other in option.other_names), name


def test_every_output_has_a_row_with_its_type() -> None:
    for name, kind in PUBLIC_OUTPUTS.items():
        assert len(rows_with("request_options.md", f"| `{name}` | {kind[0]} [{kind[1]}] |")) == 1, name


def test_every_metric_has_a_row_with_its_kind_and_labels() -> None:
    for name, metric in METRICS.items():
        [row] = rows_with("monitoring.md", f"| `{PREFIX}{name}` | {metric.kind.lower()} |")
        assert all(f"`{label}`" in row for label in metric.labels), name
