# SPDX-License-Identifier: Apache-2.0
"""The sums over a recording of the GPU, and the loop on a tiny model on the CPU."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from perf import step_profile
from perf.report import engine
from perf.step_profile import Activity, HostTimes, cases_for, summarize


def test_time_in_which_anything_runs_is_busy() -> None:
    activities = [
        Activity("a", 0, 100),
        Activity("b", 50, 60),  # beside a, and over before it
        Activity("c", 100, 200),
        Activity("a", 300, 400),
        Activity("b", 350, 500),
        Activity("c", 600, 1000),
    ]
    summary = summarize(activities, steps=2)
    assert summary["span_ms"] == pytest.approx(0.5)
    assert summary["busy_ms"] == pytest.approx(0.4)
    assert summary["idle_share"] == pytest.approx(0.2)
    assert [(kernel["name"], kernel["ms"], kernel["count"]) for kernel in summary["kernels"]] == [
        ("c", pytest.approx(0.25), 1),
        ("a", pytest.approx(0.1), 1),
        ("b", pytest.approx(0.08), 1),
    ]
    assert {(gap["after"], gap["before"]): gap["ms"] for gap in summary["gaps"]} == {
        ("c", "a"): pytest.approx(0.05),
        ("b", "c"): pytest.approx(0.05),
    }


def test_the_cases_generate_to_the_last_step() -> None:
    (equal, mixed) = cases_for([4], 64, 10, 100, steps=6, batch_max_tokens=64)
    assert equal.output_len > 4 + step_profile.WARM_UP_STEPS + 2 * 6
    assert mixed.mixed
    assert mixed.context_tokens / mixed.batch == pytest.approx(100, rel=0.05)


@pytest.mark.parametrize("options", [[], ["--prefill", "--input_len", "150"]])
def test_it_tells_the_host_s_times_on_a_cpu(options: list[str], tmp_path: Path) -> None:
    out = tmp_path / "profile.json"
    arguments = "--model tiny --device cpu --batches 2,3 --steps 2 --dtype float32 --batch_max_tokens 64 --input_len 8"
    run = CliRunner().invoke(step_profile.main, [*arguments.split(), "--out", str(out), *options])
    assert run.exit_code == 0, run.output
    result = json.loads(out.read_text())
    assert [row["batch"] for row in result["rows"]] == [2, 3]
    # Chunks of 64 of 150 prompt tokens each.
    assert [row["steps"] for row in result["rows"]] == ([5, 8] if options else [2, 2])
    assert engine.step_profile(result)[-1].endswith(" | – |")
    for row in result["rows"]:
        assert 0 < row["launch_ms"] < row["wall_ms"] * 2
        assert all(row[f"{name}_ms"] >= 0 for name in HostTimes._fields)
        row.update(summarize([Activity("one_kernel", 0, 7), Activity("another", 9, 10)], 1))
    lines = engine.step_profile(result)
    assert any("`one_kernel` | 0.007 | 0.007" in line for line in lines)
    assert any(line.startswith("| 3 |") and line.endswith("| 20.0% |") for line in lines)


def test_a_batch_that_never_runs_at_once_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = step_profile.engine_config
    small = {"max_total_token_num": "40"}
    monkeypatch.setattr(
        step_profile, "engine_config", lambda directory, given, cases: build(directory, given | small, cases)
    )
    arguments = "--model tiny --device cpu --batches 4 --steps 2 --dtype float32 --input_len 8"
    run = CliRunner().invoke(step_profile.main, [*arguments.split(), "--out", str(tmp_path / "profile.json")])
    assert run.exit_code == 1
    assert "the KV pool is too small" in run.output
