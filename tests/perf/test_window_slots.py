# SPDX-License-Identifier: Apache-2.0
"""The figures of a short simulation, computed by hand."""

import json
from pathlib import Path

from click.testing import CliRunner

from perf import window_slots
from perf.report import simulations


def test_what_a_sequence_holds_with_and_without_groups(tmp_path: Path) -> None:
    out = tmp_path / "window_slots.json"
    arguments = "--prompt 8000 --output 20 --pool_gib 4 --count 9"
    run = CliRunner().invoke(window_slots.main, [*arguments.split(), "--out", str(out)])
    assert run.exit_code == 0, run.output
    result = json.loads(out.read_text())
    layer_bytes = 2 * 8 * 256 * 2  # of a token in a layer of Gemma 3 12B
    whole, grouped = (row for row in result["rows"] if row["model"] == "Gemma 3 12B")
    # The last of 20 tokens is never read.
    assert whole["most_bytes"] == whole["last_bytes"] == 8019 * 48 * layer_bytes
    assert grouped["most_bytes"] == 8000 * 48 * layer_bytes, "the prompt is one chunk"
    in_slots = 8019 + 5 * 1024
    assert 0 <= grouped["last_bytes"] - in_slots * 8 * layer_bytes < 6 * 8 * layer_bytes, "rounded to a token"
    # Two decode in 26,278 of 65,536 slots; the prompt of a third would take 48,000 in its step.
    assert (whole["at_once"], grouped["at_once"]) == (1, 2)
    lines = simulations.window_slots(result)
    assert lines[-1].startswith("| Gemma 3 12B | yes | 6 of 8 layers | ")
