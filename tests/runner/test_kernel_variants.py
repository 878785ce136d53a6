# SPDX-License-Identifier: Apache-2.0
"""What is launched before an engine is ready covers every variant of the kernels that requests can ask for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("kv_heads", "kv_dtype"), [("2", "auto"), ("8", "int8")])
def test_no_variant_of_a_kernel_is_compiled_while_serving(kv_heads: str, kv_dtype: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.runner.kernel_variants", kv_heads, kv_dtype]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    variants = json.loads(result.stdout.splitlines()[-1])
    assert variants["ready"] > 10
    assert variants["late"] == []
