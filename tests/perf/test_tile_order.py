# SPDX-License-Identifier: Apache-2.0
"""perf.tile_order calls the kernel as a step does; without a GPU it times nothing."""

import pytest
import torch

from lightllm_backend.kernels import launchers
from perf.kernels.measure import Place
from perf.tile_order import arguments


@pytest.mark.parametrize("tail_share", [0.0, 1.0])
def test_the_order_of_tiles_changes_the_time_alone(tail_share: float) -> None:
    place = Place(torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.float16)
    given = arguments(place, [5, 40], 1, tail_share)
    out = launchers.prefill_attention(**given)
    assert out.shape == (45, 1, 128)
    assert torch.equal(out[0], given["v"][0])
