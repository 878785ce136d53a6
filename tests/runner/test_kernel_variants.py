# SPDX-License-Identifier: Apache-2.0
"""What is launched before an engine is ready covers every variant of the kernels that requests can ask for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightllm_backend.kernels.attention.merge_splits import split_count
from lightllm_backend.kernels.attention.prefill_attention import choose_prefill_blocks
from lightllm_backend.runner.warm_up import _attention_batches
from lightllm_backend.worker.load import _MEASURED_LENGTH

ROOT = Path(__file__).parents[2]


ENGINES = ["2:bfloat16:330", "8:int8:330"]
LENGTHS = [f"2:bfloat16:{length}" for length in (3072, 3001, 4096, 131072)]


@pytest.fixture(scope="module")
def variants() -> dict[str, dict[str, list[str]]]:
    """The variants that each engine launches, before it is ready and late."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    engines = ENGINES + LENGTHS
    command = [sys.executable, "-m", "tests.runner.kernel_variants", *engines]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    told: list[dict[str, list[str]]] = [json.loads(line) for line in result.stdout.splitlines() if line[0] == "{"]
    assert all(len(one["ready"]) > 10 for one in told)
    return dict(zip(engines, told, strict=True))


@pytest.mark.parametrize("engine", ENGINES)
def test_no_variant_of_a_kernel_is_compiled_while_serving(
    variants: dict[str, dict[str, list[str]]], engine: str
) -> None:
    assert variants[engine]["late"] == []


def test_kernels_are_the_same_however_long_sequences_may_be(variants: dict[str, dict[str, list[str]]]) -> None:
    """Those that a table for sequences of 3,072 tokens takes; neither aligned lengths nor others make a difference."""
    expected, *others = (variants[engine] for engine in LENGTHS)
    assert others == [expected] * 3


def test_as_many_splits_from_the_length_on_that_the_workspace_is_measured_with() -> None:
    for programs in (1, 2, 8, 16, 22, 132, 1056):
        for num_warps in (1, 2, 4):
            counts = {split_count(programs, length, 132, num_warps) for length in (_MEASURED_LENGTH, 8192, 1 << 20)}
            assert len(counts) == 1


@pytest.mark.parametrize("longest", [300, 2048, 8192])
def test_prompts_of_each_tile_size_are_run_at_start(longest: int) -> None:
    run = {choose_prefill_blocks(128, 2, (9, 0), batch.lengths.mean()) for batch in _attention_batches(longest)}
    assert run == {choose_prefill_blocks(128, 2, (9, 0), mean) for mean in range(1, longest + 1)}
