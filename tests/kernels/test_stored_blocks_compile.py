# SPDX-License-Identifier: Apache-2.0
"""The products compile at the blocks that are stored for an H100, which fit its shared memory; no GPU is needed."""

from tests.kernels.compile_harness import HOPPER, HOPPER_SHARED_KIB, compiled_shared_memory, too_large

PRODUCTS = {"linear_splits", "gated_linear", "linear_prefetch", "linear_tiles"}


def test_the_stored_blocks_compile_and_fit():
    shared = compiled_shared_memory(HOPPER)
    assert set(shared) == {f"{name}_kernel" for name in PRODUCTS}
    assert not too_large(shared, HOPPER_SHARED_KIB)
