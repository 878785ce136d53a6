# SPDX-License-Identifier: Apache-2.0
"""The benchmark on a tiny model on the CPU."""

import json
from pathlib import Path

from click.testing import CliRunner

from perf import prefix_cache
from perf.report import engine


def test_it_runs_with_and_without(tmp_path: Path) -> None:
    out = tmp_path / "prefix_cache.json"
    arguments = "--model tiny --device cpu --shared 200 --own 8 --burst 3 --repeats 1 --max_total_token_num 2000"
    run = CliRunner().invoke(prefix_cache.main, [*arguments.split(), "--out", str(out)])
    assert run.exit_code == 0, run.output
    result = json.loads(out.read_text())
    without, with_cache = result["rows"]
    assert [row["prefix_cache"] for row in result["rows"]] == [False, True]
    assert all(row[name] > 0 for row in (without, with_cache) for name in ("first_ms", "next_ms", "burst_ms"))
    lines = engine.prefix_cache(result)
    assert f"{with_cache['next_ms']:.1f}" in lines[-1]
