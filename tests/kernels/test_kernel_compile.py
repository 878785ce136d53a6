# SPDX-License-Identifier: Apache-2.0
"""Every kernel compiles for the GPUs from V100 to H100, with blocks that fit their shared memory; no GPU is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightllm_backend.kernels import launchers

ROOT = Path(__file__).parents[2]

# Compute capability, shared memory of a block in KiB, and models: dtype, head_dim, heads, KV heads.
GPUS = [
    ("7.0", 96, [("float16", 128, 32, 32)]),
    ("7.5", 64, [("float16", 128, 32, 8)]),
    ("8.0", 163, [("bfloat16", 128, 32, 32), ("float16", 256, 8, 2), ("float32", 128, 4, 4)]),
    ("8.9", 99, [("bfloat16", 128, 64, 8), ("bfloat16", 64, 9, 3), ("float16", 256, 8, 8)]),
    (
        "9.0",
        227,
        [("bfloat16", 128, 32, 32), ("bfloat16", 128, 64, 8), ("bfloat16", 80, 32, 32), ("float32", 64, 9, 3)],
    ),
]


@pytest.mark.parametrize(("capability", "shared_kib", "models"), GPUS)
def test_every_kernel_compiles_and_fits(capability, shared_kib, models):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compile_kernels", capability, json.dumps(models)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    shared = json.loads(result.stdout.splitlines()[-1])
    left_to_cublas = {"linear_splits", "gated_linear", "sum_splits"} if float(capability) < 8 else set()
    of_hopper = {"linear_tiles", "linear_prefetch", "gated_tiles", "prefill_attention_hopper"}
    expected = set(launchers.__all__) - {"linear"} - left_to_cublas | (of_hopper if capability == "9.0" else set())
    assert set(shared) == {f"{name}_kernel" for name in expected}
    too_much = {name: size for name, size in shared.items() if size > shared_kib * 1024}
    assert not too_much
