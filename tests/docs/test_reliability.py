# SPDX-License-Identifier: Apache-2.0
"""The reliability page against the tree: its tests, commands, limits, exit codes and stored figures."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from signal import SIGINT
from typing import Any

import pytest

from lightllm_backend.config import EngineConfig
from lightllm_backend.launch.service import CUT, FAILED, STOPPED
from lightllm_backend.messages.vitals import STEPS
from tests.docs.test_architecture import names
from tests.e2e.test_e2e_standstill import DEAD_SECONDS, ENDED_SECONDS, STILL_SECONDS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
TESTS = re.findall(r"`([^`\s:]+)::(\w+)`", PAGE)
COMMANDS = sorted(set(re.findall(r"`python -m ([^`]+)`", PAGE)))


def table(*columns: str) -> list[list[str]]:
    """The rows of all tables with these columns."""
    parts = PAGE.split(f"| {' | '.join(columns)} |\n")[1:]
    lines = [line for part in parts for line in re.split(r"^(?!\|)", part, flags=re.MULTILINE)[0].splitlines()[1:]]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def stored(name: str) -> Any:
    return json.loads((ROOT / "perf" / "results" / name).read_text(encoding="utf-8"))


def test_every_test_exists() -> None:
    assert len(TESTS) > 50
    assert [f"{path}::{name}" for path, name in TESTS if name not in names(ROOT / path)] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_exists_with_its_options(command: str) -> None:
    module, *arguments = shlex.split(command)
    if module == "pytest":
        assert all((ROOT / argument).exists() for argument in arguments if "/" in argument)
        assert f'"{arguments[arguments.index("-m") + 1]}: ' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        return
    path = ROOT / module.replace(".", "/")
    source = (path / "__main__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8")
    assert [one for one in arguments if one.startswith("--") and f'"{one}"' not in source] == []


def test_every_promise_has_its_test_or_command() -> None:
    rows = table("Promise", "Kept by", "Last figure")
    assert len(rows) > 40
    assert [row for row in rows if len(row) != 3 or not re.search(r"\.py::|python -m|the same", row[1])] == []


def test_the_limits_are_those_of_the_tests() -> None:
    [limits] = re.findall(r"found within (\d+) s, standing ones within (\d+) s, and (\d+) s later every", PAGE)
    assert tuple(map(float, limits)) == (DEAD_SECONDS, STILL_SECONDS, ENDED_SECONDS)


def test_every_process_is_in_the_table_of_faults_and_the_promise_has_its_worst_figures() -> None:
    rows = table("What fails", "SIGKILL", "SIGSTOP", "What clients get", "What comes back")
    roles = {row[0].partition(",")[0] for row in rows}
    assert roles >= {"worker", *STEPS, "health", "tritonserver", "launch command", "guard"}
    for column, signal in ((1, "killed"), (2, "stopped")):
        cells = [row[column].split(" / ") for row in rows if "rank" not in row[0]]
        found, ended, back = zip(*[map(float, cell) for cell in cells if len(cell) == 3], strict=True)
        [promise] = [row[2] for row in table("Promise", "Kept by", "Last figure") if f"Any process {signal}" in row[0]]
        worst = f"found after {max(found)} s at most, ended after {max(ended)} s, "
        assert promise == f"{worst}back after {min(back):.0f}–{max(back):.0f} s †"


def test_the_exit_codes_are_the_launch_command_s() -> None:
    meanings = {int(code): meaning for code, meaning, _ in table("code", "meaning", "what to do")}
    assert list(meanings) == sorted({STOPPED, FAILED, CUT, 2, 128 + SIGINT})
    assert "no running request was cut" in meanings[STOPPED]
    assert "failed more than `restart` times" in meanings[FAILED]
    assert "ended with an error" in meanings[CUT]
    settings = {"max_queue_size", "prefix_cache", "restart", "shutdown_timeout_s", "tenant_reserve", "unread_timeout_s"}
    assert {name for name in settings if f"`{name}`" in PAGE} == settings
    assert settings <= set(EngineConfig.__dataclass_fields__)


def test_the_router_s_figures_are_those_that_are_stored() -> None:
    result = stored("router_world.json")
    assert (
        f"{result['steps']:,} steps in {result['worlds']} worlds, {result['requests']:,} requests, "
        f"{result['preemptions']:,} preemptions"
    ) in PAGE
    assert f"{result['exact_worlds_filled']} of {result['exact_worlds']} worlds" in PAGE
    interleavings = (ROOT / "tests" / "generation" / "test_interleavings.py").read_text(encoding="utf-8")
    [(variable, states)] = re.findall(r"`(\w+)=1`.* in the long search ([\d,]+)", PAGE)
    assert f"# {variable}=1 explores these too: {states} states" in interleavings


def test_the_figures_of_fairness_are_those_that_are_stored() -> None:
    cases: dict[str, list[dict[str, Any]]] = {}
    for row in stored("fairness.json")["rows"]:
        cases.setdefault(row["case"], []).append(row)

    def span(case: str, column: str) -> str:
        values = [row[column] for row in cases[case]]
        return f"{min(values):.0f}–{max(values):.0f}"

    free, kept = "tenants", "tenants, reserve 0.05"
    p50, p99, reserved = span(free, "steps_p50"), span(free, "steps_p99"), span(kept, "steps_p99")
    assert f"{p50} steps (p50; alone 100), {p99} (p99); with a `tenant_reserve` of 0.05 {reserved} (p99)" in PAGE
    seconds = [row["p50_s"] for case in (free, kept) for row in cases[case]]
    alone = cases[free][0]["alone_s"]
    assert f"{min(seconds):.1f}–{max(seconds):.1f} s beside a flood, {alone:.2f} s alone" in PAGE
