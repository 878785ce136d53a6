# SPDX-License-Identifier: Apache-2.0
"""dequantize: the reference against the formula, the kernel against the reference; and the packing of 4 bits."""

import pytest
import torch

from lightllm_backend.kernels import launchers, reference
from lightllm_backend.kernels.quantized.weight import pack_int4, unpack_int4
from tests.kernels.kernel_harness import relative_error
from tests.kernels.quantized_weights import exact, random_weight

# Kind, output features, input features, group, with zero points: odd sizes, a last group that is cut short.
WEIGHTS = [
    ("int4", 33, 136, 32, True),
    ("int4", 40, 72, 72, False),
    ("int8", 33, 130, 130, False),
    ("int8", 7, 96, 64, True),
    ("fp8", 33, 130, 130, False),
    ("fp8", 20, 200, 128, False),
]


@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
def test_the_weight_is_that_of_the_formula(weight, device):
    quantised = random_weight(*weight[:4], device, weight[4])
    expected = exact(quantised)
    assert quantised.shape == expected.shape
    assert relative_error(reference.dequantize(quantised, torch.float32), expected) < 1e-6
    assert relative_error(launchers.dequantize(quantised, torch.float32), expected) < 1e-6
    half = launchers.dequantize(quantised, torch.float16)
    torch.testing.assert_close(half, reference.dequantize(quantised, torch.float16), rtol=1e-3, atol=0)


def test_every_number_of_fp8(device):
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    values = values[~values.float().isnan()].to(device).unsqueeze(0).contiguous()
    weight = random_weight("fp8", 1, values.shape[1], values.shape[1], device)
    weight = type(weight)(values, torch.ones_like(weight.scales), weight.group_size)
    assert torch.equal(launchers.dequantize(weight, torch.float32), values.float())


def test_eight_numbers_of_4_bits_are_a_word():
    numbers = torch.randint(0, 16, (3, 24))
    words = pack_int4(numbers)
    assert words.shape == (3, 3)
    assert [int(words[1, 2] >> 4 * n & 15) for n in range(8)] == numbers[1, 16:].tolist()
    assert torch.equal(unpack_int4(words), numbers.to(torch.uint8))
