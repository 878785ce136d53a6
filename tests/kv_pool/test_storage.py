# SPDX-License-Identifier: Apache-2.0
"""KVStorage: what is allocated, and that its size is what was said before."""

import pytest
import torch

from lightllm_backend.kv_pool.storage import KVStorage

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_the_pool_takes_the_memory_that_was_said(dtype):
    storage = KVStorage(num_layers=3, num_slots=7, num_kv_heads=2, head_dim=16, dtype=dtype, device=CPU)
    assert len(storage.layers) == 3
    tensors = [tensor for layer in storage.layers for tensor in layer if tensor is not None]
    assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors)
    assert sum(tensor.nbytes for tensor in tensors) == storage.num_bytes
    for k, v, scales in storage.layers:
        assert k.shape == v.shape == (7, 2, 16)
        assert k.dtype == v.dtype == dtype
        if dtype == torch.int8:
            assert scales.shape == (7, 2, 2)
        else:
            assert scales is None


@pytest.mark.parametrize("head_dim", [64, 128])
def test_int8_holds_nearly_twice_the_tokens_of_bfloat16(head_dim):
    plain, quantised = (KVStorage.slot_bytes(32, 8, head_dim, dtype) for dtype in (torch.bfloat16, torch.int8))
    assert plain / quantised >= 1.9
