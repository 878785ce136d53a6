# SPDX-License-Identifier: Apache-2.0
"""The benchmark on a tiny model on the CPU, whose lengths are not those of the other benchmarks."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from perf import long_context
from perf.report import engine


def test_it_runs_with_both_lengths_and_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_context, "SHORT_OUTPUT", 8)
    monkeypatch.setattr(long_context, "LONG_OUTPUT", 5)
    monkeypatch.setattr(long_context, "LENGTHS", {"max_req_input_len": 200, "max_req_total_len": 304})
    out = tmp_path / "long_context.json"
    arguments = "--model tiny --device cpu --prompt 350 --batches 1,2 --repeats 1"
    run = CliRunner().invoke(long_context.main, [*arguments.split(), "--out", str(out)])
    assert run.exit_code == 0, run.output
    result = json.loads(out.read_text())
    longest, short = result["rows"]
    assert (longest["max_total"], short["max_total"]) == (16384, 304)
    assert set(longest["memory"]) == {"weights", "request tables", "KV pool"}
    assert longest["memory"]["request tables"] == 16384 * 1001 * 8
    assert short["memory"]["request tables"] == 304 * 1001 * 8
    assert longest["long"]["prompt_tokens"] == 350
    assert longest["long"]["cached_ms"] < 1e3 * longest["long"]["prefill_seconds"]
    assert "long" not in short
    for row in result["rows"]:
        assert [step["batch"] for step in row["steps"]] == [1, 2]
    lines = engine.long_context(result)
    assert f"{longest['long']['prefill_seconds']:.2f}" in lines[-2]
    assert lines[-2].startswith("| 16,384 |")
    assert lines[-1].startswith("| 304 |")
