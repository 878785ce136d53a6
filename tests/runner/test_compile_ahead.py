# SPDX-License-Identifier: Apache-2.0
"""Kernels are compiled ahead of their first launch, and do not run then; on a GPU that is pretended."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_kernels_of_steps_are_compiled_ahead() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.runner.compile_ahead", "4"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout.splitlines()[-1])
    assert told["ahead"] > 10
    assert told["launchers"] == told["ahead"]
    assert told["again"] == 0
    assert "PretendedDriver" in told["launch"]
