# SPDX-License-Identifier: Apache-2.0
"""Every kernel compiles for an H100, with blocks that fit its shared memory; no GPU is needed."""

from lightllm_backend.kernels import launchers
from tests.kernels.compile_harness import HOPPER, HOPPER_SHARED_KIB, compiled_shared_memory, too_large

MODELS = [("bfloat16", 128, 32, 32), ("bfloat16", 128, 64, 8), ("bfloat16", 80, 32, 32), ("float32", 64, 9, 3)]
OF_HOPPER = {"linear_prefetch", "gated_tiles", "prefill_attention_hopper"}
ONLY_STORED = {"gated_linear"}  # see test_stored_blocks_compile.py


def test_every_kernel_compiles_and_fits():
    shared = compiled_shared_memory(HOPPER, *MODELS)
    expected = set(launchers.__all__) - {"linear"} | OF_HOPPER
    assert set(shared) == {f"{name}_kernel" for name in expected - ONLY_STORED}
    assert not too_large(shared, HOPPER_SHARED_KIB)
