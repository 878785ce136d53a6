# SPDX-License-Identifier: Apache-2.0
"""Weights of 4 and 8 bits, as they lie after loading, written out in 16."""

from __future__ import annotations

from lightllm_backend.kernels.quantized.arrange_weight import arrange_weight
from perf.kernels.linear import LLAMA_7B
from perf.kernels.measure import Case, Place
from perf.kernels.quantized import KINDS, random_weight, weight_bytes

SIZES = [(kind, *shape) for kind in KINDS for shape in LLAMA_7B.values()]
TINY = [("int4", 64, 256), ("fp8", 40, 72)]


def case(place: Place, kind: str, out_features: int, in_features: int) -> Case:
    return Case(
        label=f"{kind}, {out_features} x {in_features}",
        make=lambda: {
            "weight": arrange_weight(random_weight(place, kind, out_features, in_features)),
            "dtype": place.dtype,
        },
        bytes=weight_bytes(kind, out_features, in_features) + 2 * out_features * in_features,
    )
