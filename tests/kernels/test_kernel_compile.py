# SPDX-License-Identifier: Apache-2.0
"""Every kernel compiles for the GPUs from V100 to H100, with blocks that fit their shared memory; no GPU is needed."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lightllm_backend.kernels import launchers

ROOT = Path(__file__).parents[2]

# Compute capability, shared memory of a block in KiB, and models: dtype, head_dim, heads, KV heads, and whether they
# are compiled to machine code, which each GPU has of one dtype and each dtype of some GPU; without models, the products
# are compiled at the stored blocks. The launchers give GPUs before Ampere the same blocks, and so those from Ampere to
# Ada: of each group the least shared memory counts, and a size is compiled for one of the group's GPUs.
GPUS = [
    ("7.0", 64, [("float16", 16, 4, 1, True)]),
    ("7.5", 64, [("float16", 16, 4, 1, True), ("float16", 128, 16, 4, False)]),
    ("8.0", 99, [("bfloat16", 64, 9, 3, True), ("float32", 128, 4, 4, True)]),
    (
        "8.9",
        99,
        [
            ("float16", 32, 4, 1, True),
            ("bfloat16", 32, 4, 1, False),
            ("bfloat16", 128, 64, 8, False),
            ("float16", 256, 8, 8, False),
        ],
    ),
    ("9.0", 227, [("bfloat16", 128, 32, 8, True), ("bfloat16", 80, 8, 8, False), ("float32", 64, 9, 3, False)]),
    ("9.0", 227, []),
]
OF_HOPPER = {"linear_prefetch", "gated_tiles", "prefill_attention_hopper"}
STORED = {"linear_splits", "gated_linear", "linear_prefetch", "linear_tiles", "quantized_prefetch"}
STORED |= {"rms_norm", "all_reduce_rms_norm", "layer_norm", "rounded_silu_and_mul"}  # which round for a product of fp8
LEFT_TO_CUBLAS = {"linear_splits", "gated_linear"}  # before Ampere
OF_8_BIT_ACTIVATIONS = {"quantize_tokens", "scaled_linear"}  # which GPUs before Ampere do not multiply


def expected_kernels(capability: str, models: list[tuple[str, int, int, int, bool]]) -> set[str]:
    if not models:
        return STORED
    every = set(launchers.__all__) - {"linear", "arrange_weight"}  # which call kernels, and none
    if float(capability) < 8:
        return every - LEFT_TO_CUBLAS - OF_8_BIT_ACTIVATIONS
    return (every | OF_HOPPER) - {"gated_linear"} if capability == "9.0" else every


def compile_jobs(gpus: Sequence[tuple[str, int, list[Any]]], **environment: str) -> tuple[list[dict[str, int]], str]:
    """The most shared memory of a block in bytes, by kernel, for each of `gpus`, compiled without the interpreter; and
    what the compiler printed."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    jobs = json.dumps([(capability, models) for capability, _, models in gpus])
    command = [sys.executable, "-m", "tests.kernels.compile_kernels", jobs]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    log, _, shared = result.stdout.rstrip().rpartition("\n")
    return json.loads(shared), log


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, int]], str]:
    """Resources and ptxas's log of each product at its stored blocks. With an empty cache, ptxas runs for all."""
    cache = str(tmp_path_factory.mktemp("compiled"))
    return compile_jobs(GPUS[-1:], TRITON_CACHE_DIR=cache, TRITON_DUMP_PTXAS_LOG="1")


@pytest.fixture(scope="module")
def compiled(stored: tuple[list[dict[str, int]], str]) -> list[dict[str, int]]:
    return compile_jobs(GPUS[:-1])[0] + stored[0]


def test_tensor_cores_are_not_waited_for_at_each_product(stored: tuple[list[dict[str, int]], str]) -> None:
    """ptxas does so, and only tells in its log, if it cannot follow the registers of a product that is under way."""
    log = stored[1]
    assert "Compiling entry function 'quantized_prefetch_kernel'" in log
    assert [line for line in log.splitlines() if "wgmma" in line] == []


@pytest.mark.parametrize("index", range(len(GPUS)))
def test_every_kernel_compiles_and_fits(compiled: list[dict[str, int]], index: int) -> None:
    capability, limit_kib, models = GPUS[index]
    shared = compiled[index]
    assert set(shared) == {f"{name}_kernel" for name in expected_kernels(capability, models)}
    assert {name: size for name, size in shared.items() if size > limit_kib * 1024} == {}
