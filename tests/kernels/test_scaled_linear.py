# SPDX-License-Identifier: Apache-2.0
"""scaled_linear: activations and weight of 8 bits, against the formula."""

import pytest
import torch

from lightllm_backend.kernels import launchers, reference
from tests.kernels.kernel_harness import TOLERANCE, relative_error
from tests.kernels.quantized_weights import exact, random_weight


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("tokens", "kind", "out_features", "in_features", "group_size"),
    [(130, "int8", 72, 200, 200), (3, "fp8", 130, 130, 130), (2, "fp8", 40, 200, 128)],
)
def test_matches_the_formula(tokens, kind, out_features, in_features, group_size, with_bias, device):
    if kind == "fp8" and device.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("the GPU has no tensor cores for fp8")
    weight = random_weight(kind, out_features, in_features, group_size, device)
    x, scales = reference.quantize_tokens(torch.randn(tokens, in_features, device=device), weight)
    bias = torch.randn(out_features, device=device).half() if with_bias else None
    columns = torch.arange(in_features, device=device) // group_size
    expected = (x.double() * scales[:, columns].double()) @ exact(weight).t()
    expected += 0 if bias is None else bias.double()
    arguments = (x, scales, weight, bias, torch.float16)
    assert relative_error(reference.scaled_linear(*arguments), expected) < TOLERANCE[torch.float16]
    got = launchers.scaled_linear(*arguments)
    assert got.dtype == torch.float16
    assert relative_error(got, expected) < TOLERANCE[torch.float16]
    assert len(launchers.scaled_linear(x[:0], scales[:0], *arguments[2:])) == 0
