# SPDX-License-Identifier: Apache-2.0
"""Random weights of 4 and 8 bits, for the kernels that multiply by them.

Their kinds are int4 (groups with zero points, of 128 columns or of as many as divide them), int8 and fp8 (a scale for
each output feature), and fp8 blocks (a scale for 128 columns).
"""

from __future__ import annotations

import math

import torch

from lightllm_backend.kernels.quantized.weight import QuantizedWeight
from perf.kernels.linear import LLAMA_7B
from perf.kernels.measure import Place

GROUP = 128
KINDS = ("int4", "int8", "fp8", "fp8 blocks")
PRODUCTS = [
    (name, kind, tokens, *shape) for name, shape in LLAMA_7B.items() for kind in KINDS for tokens in (1, 8, 32, 64)
]


def random_weight(place: Place, kind: str, out_features: int, in_features: int) -> QuantizedWeight:
    group_size = in_features if kind in ("int8", "fp8") else math.gcd(GROUP, in_features)
    groups, scale = in_features // group_size, torch.float16 if kind == "int4" else torch.float32
    scales = (place.randn(groups, out_features, dtype=torch.float32).abs() + 0.5).to(scale)
    if kind == "int4":
        values = place.integers(-(2**31), 2**31, out_features, in_features // 8)
        return QuantizedWeight(values, scales, group_size, place.integers(0, 16, *scales.shape, dtype=torch.int8))
    if kind == "int8":
        return QuantizedWeight(
            place.integers(-127, 128, out_features, in_features, dtype=torch.int8), scales, group_size
        )
    values = place.randn(out_features, in_features).to(torch.float8_e4m3fn)
    return QuantizedWeight(values, scales, group_size, quantizes_input=True)


def weight_bytes(kind: str, out_features: int, in_features: int) -> int:
    """Count the bytes of the values, and of the scales and zero points of groups."""
    count = out_features * in_features
    extra = {"int4": 3 * count // GROUP, "fp8 blocks": 4 * count // GROUP}
    return (count // 2 if kind == "int4" else count) + extra.get(kind, 0)
