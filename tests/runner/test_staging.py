# SPDX-License-Identifier: Apache-2.0
"""Arrays on their way to the device; on the CPU, where there is no way."""

import numpy as np
import torch

from lightllm_backend.runner.staging import Staging

ARRAYS = [
    np.array([1, -2, 3], np.int32),
    np.array([2**40, -1], np.int64),
    np.zeros(0, np.int32),
    np.array([0.5], np.float32),
    np.array([7], np.int64),
]


def test_arrays_arrive_with_their_types_and_aligned() -> None:
    tensors = Staging(torch.device("cpu")).upload(*ARRAYS)
    for tensor, array in zip(tensors, ARRAYS, strict=True):
        assert tensor.dtype == torch.from_numpy(array).dtype
        assert tensor.tolist() == array.tolist()
        assert (tensor.data_ptr() - tensors[0].data_ptr()) % 16 == 0


def test_an_upload_leaves_those_before_as_they_are() -> None:
    staging = Staging(torch.device("cpu"))
    first = staging.upload(np.array([1, 2, 3], np.int32))
    staging.upload(np.array([4, 5, 6], np.int32))
    assert first[0].tolist() == [1, 2, 3]


def test_a_buffer_is_sent_into_a_given_tensor() -> None:
    staging = Staging(torch.device("cpu"))
    target = torch.zeros(8, dtype=torch.uint8)
    buffer = staging.buffer(8)
    buffer.send(8)[:] = torch.arange(8, dtype=torch.uint8)
    assert buffer.send(8, target) is target
    assert target.tolist() == list(range(8))
