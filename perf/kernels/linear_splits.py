# SPDX-License-Identifier: Apache-2.0
"""Products that a norm reads next, in parts: those whose output features are too few to occupy a GPU."""

from __future__ import annotations

from torch.nn import functional

from perf.kernels.measure import Arguments, Case, Place

SIZES = [
    *(("output", tokens, 4096, 4096) for tokens in (1, 8, 32, 64)),
    *(("down", tokens, 4096, 11008) for tokens in (1, 8, 32, 64)),
    *(("70B output, tp 4", tokens, 8192, 2048) for tokens in (1, 32)),
    *(("70B down, tp 4", tokens, 8192, 7168) for tokens in (1, 32)),
]
TINY = [("split", 1, 64, 256), ("whole", 3, 1024, 128)]


def case(place: Place, name: str, tokens: int, out_features: int, in_features: int) -> Case:
    def make() -> Arguments:
        return {"x": place.randn(tokens, in_features), "weight": place.randn(out_features, in_features)}

    return Case(
        label=f"{name}, {tokens} x {in_features} x {out_features}",
        make=make,
        bytes=2 * (out_features * in_features + tokens * (in_features + out_features)),
        operations=2 * tokens * in_features * out_features,
        result=lambda parts: parts.float().sum(0),
        torch={"linear": lambda a: lambda: functional.linear(a["x"], a["weight"])},
    )
