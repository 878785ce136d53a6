# SPDX-License-Identifier: Apache-2.0
"""Runs compile_kernels in a process without Triton-lang's interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
HOPPER = "9.0"
HOPPER_SHARED_KIB = 227


def compiled_shared_memory(capability: str, *models: tuple[str, int, int, int]) -> dict[str, int]:
    """The most shared memory of a block in bytes, by kernel. `models` are dtype, head_dim, heads, KV heads; without
    them, the products are compiled at the stored blocks."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compile_kernels", capability]
    command += [json.dumps(models)] if models else []
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    shared: dict[str, int] = json.loads(result.stdout.splitlines()[-1])
    return shared


def too_large(shared: dict[str, int], limit_kib: int) -> dict[str, int]:
    return {name: size for name, size in shared.items() if size > limit_kib * 1024}
