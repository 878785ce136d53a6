# SPDX-License-Identifier: Apache-2.0
"""The order of a weight's columns that Hopper's kernel reads: no product changes by it."""

from dataclasses import replace

import pytest
import torch

from lightllm_backend.kernels import launchers, reference
from lightllm_backend.kernels.quantized import arrange_weight as module
from lightllm_backend.kernels.quantized.fragments import fragment_columns, into_fragments, pair_columns
from lightllm_backend.kernels.quantized.reference import pair_tokens
from lightllm_backend.kernels.quantized.rounded_tokens import PAIR_FACTORS
from tests.kernels.kernel_harness import TOLERANCE, relative_error
from tests.kernels.quantized_weights import exact, random_weight

DTYPE = torch.float16  # see test_linear


@pytest.mark.parametrize("is_int4", [False, True])
def test_a_thread_has_what_it_multiplies_side_by_side(is_int4):
    """The definition of wgmma's left operand, and of the pairs in a word, written out."""
    columns = fragment_columns(is_int4).view(4, -1, 8 if is_int4 else 4)  # threads, words, numbers
    for thread in range(4):
        own = [
            16 * block + 8 * half + 2 * thread + second for block in range(4) for half in (0, 1) for second in (0, 1)
        ]
        assert sorted(columns[thread].flatten().tolist()) == own
        for word in columns[thread].tolist():
            pairs = zip(word[:4], word[4:], strict=True) if is_int4 else zip(word[:2], word[2:], strict=True)
            assert all(second == first + 1 for first, second in pairs)


@pytest.mark.parametrize(
    ("kind", "group_size", "with_zeros"),
    [("int4", 64, True), ("int4", 128, False), ("int8", 256, False), ("fp8", 128, False)],
)
@pytest.mark.parametrize("tokens", [3, 70])
def test_no_product_changes(kind, group_size, with_zeros, tokens, device):
    weight = random_weight(kind, 72, 256, group_size, device, with_zeros)
    x = torch.randn(tokens, 256, device=device).to(DTYPE)
    whole = exact(weight)
    arranged = into_fragments(weight)
    for kernels in (launchers, reference):
        assert torch.equal(kernels.dequantize(arranged, torch.float32).double(), whole.float().double())
        assert relative_error(kernels.linear(x, arranged).double(), x.double() @ whole.t()) < TOLERANCE[DTYPE]
    parts = launchers.quantized_splits(x, arranged).float().sum(0)
    assert relative_error(parts, x.double() @ whole.t()) < TOLERANCE[DTYPE]


@pytest.mark.parametrize(
    ("kind", "group_size", "with_zeros"),
    [("int4", 192, True), ("int4", 448, False), ("int8", 64, True), ("int8", 448, False), ("fp8", 128, False)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_it_is_written_out_in_order(kind, group_size, with_zeros, dtype, device):
    """With tiles that end within the matrix, and groups within tiles."""
    weight = random_weight(kind, 33, 448, group_size, device, with_zeros)
    expected = exact(weight).float().to(dtype)
    assert torch.equal(launchers.dequantize(into_fragments(weight), dtype), expected)


def test_every_number_of_fp8_is_written_out(device):
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    values = values[~values.float().isnan()].repeat(64).view(1, -1).to(device)
    weight = random_weight("fp8", 1, values.shape[1], values.shape[1], device)
    weight = replace(weight, values=values.clone(), scales=torch.ones_like(weight.scales))
    assert torch.equal(launchers.dequantize(into_fragments(weight), torch.float32), values.float())


@pytest.mark.parametrize(("kind", "group_size"), [("int8", 256), ("fp8", 256), ("fp8", 128)])
def test_activations_are_rounded_in_the_same_order(kind, group_size, device):
    x = torch.randn(5, 256, device=device).to(DTYPE)
    places = (torch.arange(0, 256, 64)[:, None] + fragment_columns(is_int4=False)).flatten()
    arranged = into_fragments(random_weight(kind, 64, 256, group_size, device))
    plain = replace(arranged, in_fragments=False)  # another weight, but the same rounding
    for kernels in (launchers, reference):
        values, scales = kernels.quantize_tokens(x, arranged)
        expected, expected_scales = kernels.quantize_tokens(x, plain)
        assert torch.equal(values.float(), expected.float()[:, places])
        assert torch.equal(scales, expected_scales)
        product = kernels.scaled_linear(values, scales, arranged, None, torch.float32)
        numbers = values.float()[:, places.argsort()] * scales.repeat_interleave(group_size, 1)
        assert relative_error(product, numbers @ reference.dequantize(arranged, torch.float32).t()) < 1e-3


@pytest.mark.parametrize("kind", ["int4", "fp8"])
def test_pairs_are_as_precise_as_bfloat16(kind, device):
    x = torch.randn(5, 256, device=device).bfloat16()
    x[0] = 0.0
    x[1, 3] = 100.0
    x[2] *= 1e-6
    arranged = into_fragments(random_weight(kind, 64, 256, 128 if kind == "int4" else 256, device))
    pairs = pair_tokens(x, arranged)
    factor = PAIR_FACTORS[pairs.values.dtype]
    places = (torch.arange(0, 256, 64)[:, None] + pair_columns(kind == "int4")).flatten()
    numbers = pairs.values.float().view(5, 2, 256)[:, :, places.argsort()]
    meant = (factor * numbers[:, 0] + numbers[:, 1]) * pairs.scales[:, None]
    if kind == "fp8":  # nothing is lost, unless it is very small beside the largest
        large = x.abs() >= x.abs().amax(1, keepdim=True) * 2**-13
        assert torch.equal(meant[large], x.float()[large])
    assert bool(((meant - x.float()).abs() <= pairs.scales[:, None] / 2).all())
    assert int(numbers.abs().max()) <= {"int4": 128, "fp8": 448}[kind]
    product = reference.linear(pairs, arranged)
    assert relative_error(product, reference.linear(x.float(), arranged)) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("is_int4", [False, True])
def test_pairs_meet_the_weights_that_tensor_cores_multiply_them_by(is_int4):
    """A word of int4 becomes the bytes of its even digits and of its odd ones, four columns of int8 each."""
    columns = pair_columns(is_int4)
    if is_int4:
        words = fragment_columns(is_int4=True).view(4, 2, 4, 2)  # threads, words, bytes, low and high digits
        columns = columns.view(2, 2, 4, 4)  # words, halves, threads, bytes
        assert torch.equal(columns.permute(2, 0, 3, 1), words)
    else:
        assert torch.equal(columns, fragment_columns(is_int4=False))


def test_only_weights_that_the_kernel_takes_are_arranged(device, monkeypatch):
    def is_arranged(columns, group_size, capability=(9, 0), is_tried=True):
        monkeypatch.setattr(module, "compute_capability", lambda _: capability)
        monkeypatch.setattr(module, "GLUON_TRIED", is_tried)
        return launchers.arrange_weight(random_weight("int8", 8, columns, group_size, device)).in_fragments

    assert is_arranged(128, 128)
    assert is_arranged(192, 192)
    assert is_arranged(256, 64)
    assert not is_arranged(256, 32)
    assert not is_arranged(200, 200)
    assert not is_arranged(128, 128, capability=(8, 9))
    assert not is_arranged(128, 128, is_tried=False)


def test_a_weight_is_arranged_once(device, monkeypatch):
    monkeypatch.setattr(module, "compute_capability", lambda _: (9, 0))
    monkeypatch.setattr(module, "GLUON_TRIED", True)
    weight = random_weight("int8", 8, 128, 128, device)
    whole, exact_values = exact(weight), weight.values.clone()
    twice = launchers.arrange_weight(launchers.arrange_weight(weight))
    assert torch.equal(reference.dequantize(twice, torch.float32), whole.float())
    assert not torch.equal(twice.values, exact_values)
