# SPDX-License-Identifier: Apache-2.0
"""Activations rounded to 8 bits."""

from __future__ import annotations

from perf.kernels.measure import Case, Place
from perf.kernels.quantized import random_weight

SIZES = [(kind, tokens, 4096) for kind in ("int8", "fp8", "fp8 blocks") for tokens in (128, 8192)]
TINY = [("int8", 3, 256)]


def case(place: Place, kind: str, tokens: int, features: int) -> Case:
    return Case(
        label=f"{kind}, {tokens} x {features}",
        make=lambda: {"x": place.randn(tokens, features), "weight": random_weight(place, kind, 64, features)},
        bytes=3 * tokens * features,
        result=lambda rounded: rounded[0].float(),
    )
