# SPDX-License-Identifier: Apache-2.0
"""Products of few tokens with weights of 4 and 8 bits."""

from __future__ import annotations

from perf.kernels.measure import Arguments, Case, Place
from perf.kernels.quantized import PRODUCTS, random_weight, weight_bytes

SIZES = PRODUCTS
TINY = [("tiny", "int4", 3, 64, 256), ("tiny", "fp8 blocks", 1, 64, 128)]


def case(place: Place, name: str, kind: str, tokens: int, out_features: int, in_features: int) -> Case:
    def make() -> Arguments:
        return {"x": place.randn(tokens, in_features), "weight": random_weight(place, kind, out_features, in_features)}

    return Case(
        label=f"{name}, {kind}, {tokens} x {in_features} x {out_features}",
        make=make,
        bytes=weight_bytes(kind, out_features, in_features) + 2 * tokens * (in_features + out_features),
        operations=2 * tokens * in_features * out_features,
        result=lambda parts: parts.float().sum(0),
    )
