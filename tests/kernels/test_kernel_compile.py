# SPDX-License-Identifier: Apache-2.0
"""Every kernel compiles for the GPUs from V100 to L40, with blocks that fit their shared memory; no GPU is needed."""

import pytest

from lightllm_backend.kernels import launchers
from tests.kernels.compile_harness import compiled_shared_memory, too_large

# Compute capability, shared memory of a block in KiB, and models: dtype, head_dim, heads, KV heads.
GPUS = [
    ("7.0", 96, [("float16", 128, 32, 32)]),
    ("7.5", 64, [("float16", 128, 32, 8)]),
    ("8.0", 163, [("bfloat16", 128, 32, 32), ("float16", 256, 8, 2), ("float32", 128, 4, 4)]),
    ("8.9", 99, [("bfloat16", 128, 64, 8), ("bfloat16", 64, 9, 3), ("float16", 256, 8, 8)]),
]


@pytest.mark.parametrize(("capability", "shared_kib", "models"), GPUS)
def test_every_kernel_compiles_and_fits(capability, shared_kib, models):
    shared = compiled_shared_memory(capability, *models)
    left_to_cublas = {"linear_splits", "gated_linear", "sum_splits"} if float(capability) < 8 else set()
    assert set(shared) == {f"{name}_kernel" for name in set(launchers.__all__) - {"linear"} - left_to_cublas}
    assert not too_large(shared, shared_kib)
