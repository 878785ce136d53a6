# SPDX-License-Identifier: Apache-2.0
"""GridWeight: which weights have a grid, and its product against that of the floats."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from lightllm_backend.kernels import compiled, reference
from lightllm_backend.kernels.quantized import grid_weight
from lightllm_backend.kernels.quantized.grid_weight import GridWeight, with_grid
from tests.kernels.kernel_harness import relative_error
from tests.kernels.quantized_weights import exact, random_weight

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
def test_a_weight_is_its_grid(bits, dtype, monkeypatch) -> None:
    monkeypatch.setattr(grid_weight, "_CHUNK", 64 * 96)
    floats = on_grid(bits, 192).to(dtype)
    weight = with_grid(floats)
    assert isinstance(weight, GridWeight)
    assert (weight.shape, weight.bits) == (floats.shape, bits)
    # The floats are rounded to bfloat16.
    assert relative_error(weight.dequantized(), floats.float()) < 4e-3


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernels", [reference, compiled])
def test_activations_of_8_bits_are_multiplied(bits, dtype, kernels) -> None:
    floats = on_grid(bits).to(dtype)
    weight, bias = with_grid(floats), torch.randn(128).to(dtype)
    for tokens in (1, 3, 4, 9):
        x = torch.randn(tokens, 96).to(dtype)
        expected = functional.linear(x.double(), floats.double(), bias.double())
        for out in (kernels.linear(x, weight, bias), kernels.linear_splits(x, weight, bias)[0]):
            assert out.dtype == dtype
            assert relative_error(out, expected) < 1.5e-2
        out = torch.empty(tokens, 128, dtype=dtype)
        assert kernels.linear(x, weight, out=out) is out
        assert torch.equal(out, kernels.linear(x, weight))


def test_weights_do_not_share_memory() -> None:
    floats = [on_grid(bits, rows) for bits, rows in ((4, 32), (8, 64), (4, 128))]
    weights = [with_grid(tensor) for tensor in floats]
    for weight, tensor in zip(weights, floats, strict=True):
        assert weight.packed.data_ptr() % 64 == 0
        assert relative_error(weight.dequantized(), tensor.float()) < 4e-3


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kernels", [reference, compiled])
def test_more_tokens_are_multiplied_by_the_floats(bits, kernels) -> None:
    floats = on_grid(bits)
    weight, x = with_grid(floats), torch.randn(65, 96).bfloat16()
    assert torch.equal(kernels.linear(x, weight), functional.linear(x, floats))
    # Rounded activations would show.
    assert not torch.equal(kernels.linear(x[:64], weight), functional.linear(x[:64], floats))


def test_equal_and_zero_weights_lie_on_a_grid() -> None:
    for value in (0.0, 0.75, -0.75):
        floats = torch.full((64, 32), value)
        weight = with_grid(floats)
        assert isinstance(weight, GridWeight)
        x = torch.ones(1, 32)
        assert torch.allclose(weight.linear(x, None), functional.linear(x, floats), rtol=1e-3)


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
    for odd in (on_grid(4)[:48], on_grid(4)[:, :40]):
        assert with_grid(odd) is odd
    floats = on_grid(4)
    monkeypatch.setattr(grid_weight, "has_kernel", lambda device: False)
    assert with_grid(floats) is floats


@pytest.mark.parametrize("group_size", [32, 64, 160])
@pytest.mark.parametrize("with_zeros", [False, True])
@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_a_quantised_weight_lies_on_a_grid(kind, with_zeros, group_size, monkeypatch) -> None:
    monkeypatch.setattr(grid_weight, "_CHUNK", 32 * 160)
    quantised = random_weight(kind, 96, 160, group_size, torch.device("cpu"), with_zeros)
    weight = quantised.on_grid()
    assert isinstance(weight, GridWeight)
    assert (weight.shape, weight.bits, weight.floats) == (quantised.shape, int(kind[-1]), None)
    # Scales and zero points times scales are rounded to float16.
    assert relative_error(weight.dequantized(), exact(quantised)) < 5e-4
    bias = torch.randn(96)
    for tokens in (1, 5, 70):
        x = torch.randn(tokens, 160).bfloat16()
        product = compiled.linear(x, weight, bias.bfloat16())
        assert relative_error(product, x.double() @ exact(quantised).t() + bias) < 1.5e-2
        assert relative_error(product, reference.linear(x, weight, bias.bfloat16())) < 4e-3


def test_a_scale_that_float16_lacks_is_taken_only_beside_larger_ones() -> None:
    quantised = random_weight("int8", 64, 64, 64, torch.device("cpu"))
    quantised.scales[0, 5] = 1e-9  # of a feature that is hardly used
    assert isinstance(quantised.on_grid(), GridWeight)
    for factor in (-1e-4, 1e9):
        assert replace(quantised, scales=quantised.scales * factor).on_grid() is None


def test_quantised_weights_that_no_grid_expresses(monkeypatch) -> None:
    cpu = torch.device("cpu")
    order = torch.arange(63, -1, -1, dtype=torch.int32)
    for odd in (
        random_weight("fp8", 64, 64, 64, cpu),
        random_weight("int4", 64, 64, 16, cpu),
        random_weight("int4", 48, 64, 32, cpu),
        random_weight("int8", 64, 80, 80, cpu),
        replace(random_weight("int4", 64, 64, 32, cpu), order=order),
    ):
        assert odd.on_grid() is None
    monkeypatch.setattr(grid_weight, "has_kernel", lambda device: False)
    assert random_weight("int4", 64, 64, 32, cpu).on_grid() is None
