# SPDX-License-Identifier: Apache-2.0
"""The README's tables against the code that they describe."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from lightllm_backend.config import EngineConfig
from lightllm_backend.option_table import OPTIONS
from lightllm_backend.triton_server.metrics import COUNTERS, GAUGES, HISTOGRAMS
from lightllm_backend.triton_server.tensors import PUBLIC_OUTPUTS

README = (Path(__file__).parents[1] / "README.md").read_text()


def rows_with(*cells: str) -> list[str]:
    return [line for line in README.splitlines() if line.startswith("|") and all(cell in line for cell in cells)]


@pytest.mark.parametrize("setting", fields(EngineConfig), ids=lambda setting: setting.name)
def test_every_setting_is_in_the_table_with_its_default(setting) -> None:
    value = str(setting.default).lower() if isinstance(setting.default, bool) else setting.default
    default = "–" if value is None else f"`{value}`"
    assert len(rows_with(f"| `{setting.name}` | {default} |", setting.metadata["help"].replace("|", "/"))) == 1


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_is_documented_with_its_type_and_its_other_names(name: str) -> None:
    kind = [f"{datatype} [{size}]" for datatype, size in [OPTIONS[name].tensor or ("", 0)] if datatype]
    others = [f"`{other}`" for other in OPTIONS[name].other_names]
    assert len(rows_with(f"`{name}`", *kind, *others)) >= 1


@pytest.mark.parametrize(("name", "kind"), PUBLIC_OUTPUTS.items())
def test_every_output_is_in_the_table_with_its_type(name: str, kind: tuple[str, int]) -> None:
    assert len(rows_with(f"| `{name}` | {kind[0]} [{kind[1]}] |")) == 1


def test_every_metric_is_named() -> None:
    for name in [*GAUGES, *COUNTERS, *HISTOGRAMS, "requests_total"]:
        assert re.search(rf"`lightllm_{name}[`{{]", README), name
