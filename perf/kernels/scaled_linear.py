# SPDX-License-Identifier: Apache-2.0
"""Products of 8-bit activations with 8-bit weights. Their limit is told in operations of 16 bits, of which GPUs do half
as many a second."""

from __future__ import annotations

from lightllm_backend.kernels import reference
from perf.kernels.linear import LLAMA_7B
from perf.kernels.measure import Arguments, Case, Place
from perf.kernels.quantized import random_weight, weight_bytes

SIZES = [
    (name, kind, tokens, *shape)
    for name, shape in LLAMA_7B.items()
    for kind in ("int8", "fp8", "fp8 blocks")
    for tokens in (128, 256, 8192)
]
TINY = [("tiny", "int8", 3, 64, 256), ("tiny", "fp8 blocks", 2, 40, 128)]


def case(place: Place, name: str, kind: str, tokens: int, out_features: int, in_features: int) -> Case:
    def make() -> Arguments:
        weight = random_weight(place, kind, out_features, in_features)
        x, scales = reference.quantize_tokens(place.randn(tokens, in_features), weight)
        return {"x": x, "x_scales": scales, "weight": weight, "bias": None, "dtype": place.dtype}

    return Case(
        label=f"{name}, {kind}, {tokens} x {in_features} x {out_features}",
        make=make,
        bytes=weight_bytes(kind, out_features, in_features) + tokens * (in_features + 2 * out_features),
        operations=2 * tokens * in_features * out_features,
    )
