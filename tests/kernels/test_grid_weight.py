# SPDX-License-Identifier: Apache-2.0
"""GridWeight: which weights have a grid, and its product against that of the floats."""

import pytest
import torch
from torch.nn import functional

from lightllm_backend.kernels import reference
from lightllm_backend.kernels.quantized import grid_weight
from lightllm_backend.kernels.quantized.grid_weight import GridWeight, with_grid
from tests.kernels.kernel_harness import relative_error

pytestmark = pytest.mark.skipif(not grid_weight.has_kernel(torch.device("cpu")), reason="this CPU has no kernel")


def on_grid(bits: int, rows: int = 128, columns: int = 96) -> torch.Tensor:
    """What a GGUF file's Q4_1 (4 bits) or Q8_0 (8 bits) dequantises to, in bfloat16."""
    generator = torch.Generator().manual_seed(bits)
    groups = torch.randn(rows, columns // 32, 32, generator=generator)
    if bits == 4:
        least, greatest = groups.aminmax(dim=-1, keepdim=True)
        scales = ((greatest - least) / 15).half().float()
        values = ((groups - least) / scales).round() * scales + least.half().float()
    else:
        scales = (groups.abs().amax(-1, keepdim=True) / 127).half().float()
        values = (groups / scales).round() * scales
    return values.flatten(1).bfloat16()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [64, 192])
def test_few_tokens_are_multiplied_by_the_grid(bits, dtype, rows, monkeypatch) -> None:
    monkeypatch.setattr(grid_weight, "_CHUNK", 64 * 96)
    floats = on_grid(bits, rows).to(dtype)
    weight = with_grid(floats)
    assert isinstance(weight, GridWeight)
    assert weight.shape == floats.shape
    assert weight.halves == bits // 4
    bias = torch.randn(rows).to(dtype)
    for tokens in (1, 3, 4):
        x = torch.randn(tokens, 96).to(dtype)
        expected = functional.linear(x.bfloat16().double(), floats.double(), bias.double())
        for out in (reference.linear(x, weight, bias), reference.linear_splits(x, weight, bias)[0]):
            assert out.dtype == dtype
            assert relative_error(out, expected) < 5e-3
        out = torch.empty(tokens, rows, dtype=dtype)
        assert torch.equal(reference.linear(x, weight, out=out), weight.linear(x, None))


@pytest.mark.parametrize("bits", [4, 8])
def test_more_tokens_are_multiplied_by_the_floats(bits) -> None:
    floats = on_grid(bits).float()
    x = torch.randn(17, 96)
    assert torch.equal(reference.linear(x, with_grid(floats)), functional.linear(x, floats))
    # Rounded activations would show.
    few = reference.linear(x[:1], with_grid(floats))
    assert not torch.allclose(few, functional.linear(x[:1], floats), rtol=0, atol=1e-6)


def test_equal_and_zero_weights_lie_on_a_grid() -> None:
    for value in (0.0, 0.75, -0.75):
        floats = torch.full((64, 32), value)
        weight = with_grid(floats)
        assert isinstance(weight, GridWeight)
        x = torch.ones(1, 32)
        assert torch.allclose(weight.linear(x, None), functional.linear(x, floats))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("wrong", [0.1, float("nan"), float("inf")])
def test_a_weight_beside_the_grid_is_found_wherever_it_is(bits, wrong) -> None:
    floats = on_grid(bits).float()
    index = (floats[-1] - floats[-1].median()).abs().argmin()
    floats[-1, index] += wrong
    assert with_grid(floats) is floats


def test_weights_that_no_grid_expresses_stay_as_they_are(monkeypatch) -> None:
    trained = torch.randn(128, 96).bfloat16()
    assert with_grid(trained) is trained
    for odd in (on_grid(4)[:96], on_grid(4)[:, :40]):
        assert with_grid(odd) is odd
    floats = on_grid(4)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert with_grid(floats) is floats
