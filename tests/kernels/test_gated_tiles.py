# SPDX-License-Identifier: Apache-2.0
"""gated_tiles: what gated_linear launches for many tokens, against its reference."""

import pytest
import torch

from lightllm_backend.kernels import launchers, reference
from lightllm_backend.kernels.linear import choice, gated_tiles
from tests.kernels.kernel_harness import TOLERANCE, relative_error

DTYPE = torch.float16  # see test_linear
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="made for Hopper"
)


@pytest.mark.parametrize(
    ("tokens", "features", "in_features", "is_gelu"),
    [(1, 8, 64, False), (128, 128, 72, True), (300, 392, 136, False), (2200, 264, 64, False)],
)
def test_matches_the_reference(tokens, features, in_features, is_gelu, device):
    """Tokens, features and columns that fill no tile too; several tiles for each program, and fewer than
    programs; more tiles of tokens than a group has."""
    x = torch.randn(tokens, in_features + 8, device=device).to(DTYPE)[:, :in_features]
    weight = torch.randn(2 * features, in_features, device=device).to(DTYPE) / in_features**0.5
    out = gated_tiles.gated_tiles(x, weight, is_gelu)
    assert (out.shape, out.dtype) == ((tokens, features), DTYPE)
    expected = reference.gated_linear(x.float(), weight.float(), is_gelu=is_gelu)
    assert relative_error(out, expected) < TOLERANCE[DTYPE]


def test_many_tokens_of_hopper_go_there(monkeypatch, device):
    if device.type == "cpu":
        monkeypatch.setattr(choice, "compute_capability", lambda device: (9, 0))
        monkeypatch.setattr(choice, "has_descriptors", lambda *tensors: True)
    # What others compute is no matter here, and the interpreter runs silu_and_mul's programs one by one.
    monkeypatch.setattr("lightllm_backend.kernels.linear.gated_linear.silu_and_mul", reference.silu_and_mul)
    launched = []
    monkeypatch.setattr(gated_tiles, "gated_tiles", lambda *arguments: launched.append(arguments))
    x, weight = torch.randn(1025, 64, device=device).to(DTYPE), torch.randn(64, 64, device=device).to(DTYPE)
    launchers.gated_linear(x, weight)
    assert launched == [(x, weight, False)]
    for others in ((x[:1024], weight), (x, weight, weight[:, 0].contiguous()), (x, weight[:24])):
        launchers.gated_linear(*others)
    assert len(launched) == 1
