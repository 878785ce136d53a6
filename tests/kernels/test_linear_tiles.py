# SPDX-License-Identifier: Apache-2.0
"""linear_tiles: what linear_splits and gated_linear launch for more tokens, against their references."""

import pytest
import torch

from lightllm_backend.kernels import launchers, reference
from lightllm_backend.kernels.hardware import has_descriptors
from lightllm_backend.kernels.linear import choice
from lightllm_backend.kernels.linear.choice import LinearBlocks
from lightllm_backend.kernels.linear.linear_tiles import launch_tiles
from tests.kernels.kernel_harness import TOLERANCE, relative_error

DTYPE = torch.float16  # see test_linear
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0), reason="the GPU knows no descriptors"
)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize(
    ("tokens", "features", "in_features", "splits"), [(65, 64, 256, 1), (128, 200, 320, 3), (130, 72, 96, 1)]
)
def test_matches_the_reference(tokens, features, in_features, splits, is_gated, with_bias, device):
    """Tokens, features and columns that fill no tile too, and columns that the splits do not divide."""
    if is_gated:
        splits = 1
    rows = features * (2 if is_gated else 1)
    x = torch.randn(tokens, in_features + 8, device=device).to(DTYPE)[:, :in_features]
    weight = torch.randn(rows, in_features, device=device).to(DTYPE) / in_features**0.5
    bias = torch.randn(rows, device=device).to(DTYPE) if with_bias else None
    out = torch.full(
        (splits, tokens, features), torch.nan, device=device, dtype=DTYPE if splits == 1 else torch.float32
    )
    launch_tiles(x, weight, bias, out, LinearBlocks(64, 64, 3, 4, splits), is_gated)
    of_floats = (x.float(), weight.float(), None if bias is None else bias.float())
    expected = reference.gated_linear(*of_floats) if is_gated else reference.linear(*of_floats)
    assert relative_error(out.float().sum(0), expected) < TOLERANCE[DTYPE]


def test_others_launch_it(monkeypatch, device):
    """By what is stored for this GPU, whose name in the table is changed for the interpreter's."""
    if device.type == "cpu":
        monkeypatch.setattr(choice, "has_descriptors", lambda *tensors: True)
    blocks = [64, 64, 3, 4, 2]
    table = {"64 x 256": {"128": blocks}, "64 x 256, gated": {"128": [*blocks[:4], 1]}}
    capability = "{}.{}".format(*choice.compute_capability(device))
    monkeypatch.setattr(choice, "stored_blocks", lambda path: {capability: table})
    x, weight = (torch.randn(rows, 256, device=device).to(DTYPE) for rows in (70, 64))
    parts = launchers.linear_splits(x, weight)
    assert (parts.shape, parts.dtype) == ((2, 70, 64), torch.float32)
    expected = reference.linear(x.float(), weight.float())
    assert relative_error(parts.sum(0), expected) < TOLERANCE[DTYPE]
    assert relative_error(launchers.linear(x, weight), expected) < TOLERANCE[DTYPE]
    gated = launchers.gated_linear(x, weight)
    assert relative_error(gated, reference.gated_linear(x.float(), weight.float())) < TOLERANCE[DTYPE]


def test_what_descriptors_ask_for(monkeypatch):
    from lightllm_backend.kernels import hardware

    x = torch.empty(4, 64, dtype=DTYPE)
    assert not has_descriptors(x), "the interpreter passes for an A100"
    monkeypatch.setattr(hardware, "compute_capability", lambda device: (9, 0))
    assert has_descriptors(x)
    assert not has_descriptors(x, torch.empty(4, 60, dtype=DTYPE)), "rows that are not aligned"
    assert not has_descriptors(torch.empty(4, 72, dtype=DTYPE)[:, 4:]), "nor their beginning"
    monkeypatch.setattr(hardware, "TensorDescriptor", None)
    assert not has_descriptors(x)
