# SPDX-License-Identifier: Apache-2.0
"""The first half of LLaMA's feed-forward layer; 7168 features of 8192 are 70B's on one of four GPUs."""

from __future__ import annotations

from torch.nn import functional

from perf.kernels.measure import Arguments, Case, Place

SIZES = [
    *((tokens, 11008, 4096) for tokens in (1, 8, 32, 64, 1024, 2048, 8192)),
    *((tokens, 7168, 8192) for tokens in (1, 32, 8192)),
]
TINY = [(1, 512, 256), (3, 512, 128)]


def case(place: Place, tokens: int, features: int, in_features: int) -> Case:
    def make() -> Arguments:
        return {"x": place.randn(tokens, in_features), "weight": place.randn(2 * features, in_features) / 64}

    def torchs(arguments: Arguments) -> object:
        gate, up = functional.linear(arguments["x"], arguments["weight"]).chunk(2, 1)
        return functional.silu(gate) * up

    return Case(
        label=f"{tokens} x {in_features} x 2 x {features}",
        make=make,
        bytes=2 * (2 * features * in_features + tokens * (in_features + features)),
        operations=4 * tokens * in_features * features,
        torch={"linear, silu and *": lambda a: lambda: torchs(a)},
    )
