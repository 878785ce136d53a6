# SPDX-License-Identifier: Apache-2.0
"""The README's tables against the code that they describe."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from lightllm_backend import readme_tables
from lightllm_backend.config import EngineConfig
from lightllm_backend.option_table import OPTIONS
from lightllm_backend.triton_server.metrics import COUNTERS, GAUGES, HISTOGRAMS
from lightllm_backend.triton_server.tensors import PUBLIC_OUTPUTS

README = (Path(__file__).parents[1] / "README.md").read_text()


def rows_with(*cells: str) -> list[str]:
    return [line for line in README.splitlines() if line.startswith("|") and all(cell in line for cell in cells)]


def test_the_tables_of_settings_and_options_are_as_the_command_writes_them() -> None:
    assert readme_tables.updated(README) == README, "run python -m lightllm_backend.readme_tables"


@pytest.mark.parametrize("setting", fields(EngineConfig), ids=lambda setting: setting.name)
def test_the_command_writes_a_row_for_every_setting(setting) -> None:
    assert len(rows_with(f"| `{setting.name}` |")) == 1


@pytest.mark.parametrize("name", OPTIONS)
def test_the_command_writes_a_row_for_every_option_and_its_other_names(name: str) -> None:
    assert OPTIONS[name].help
    [row] = rows_with(f"| `{name}` |", "| {} [{}] |".format(*OPTIONS[name].tensor or ("–", 0)).replace("– [0]", "–"))
    assert all(f"`{other}`" in row for other in OPTIONS[name].other_names)


@pytest.mark.parametrize("marker", ["<!-- settings:", "<!-- end of options -->"])
def test_a_readme_without_a_marker_is_refused(marker: str) -> None:
    with pytest.raises(ValueError, match="has no table between"):
        readme_tables.updated(README.replace(marker, ""))


@pytest.mark.parametrize(("name", "kind"), PUBLIC_OUTPUTS.items())
def test_every_output_is_in_the_table_with_its_type(name: str, kind: tuple[str, int]) -> None:
    assert len(rows_with(f"| `{name}` | {kind[0]} [{kind[1]}] |")) == 1


def test_every_metric_is_named() -> None:
    for name in [*GAUGES, *COUNTERS, *HISTOGRAMS, "requests_total"]:
        assert re.search(rf"`lightllm_{name}[`{{]", README), name
