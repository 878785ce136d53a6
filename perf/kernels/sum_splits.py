# SPDX-License-Identifier: Apache-2.0
"""The sum of a split product's parts."""

from __future__ import annotations

from perf.kernels.measure import Arguments, Case, Place

SIZES = [(splits, tokens, 4096) for splits in (2, 4) for tokens in (1, 8, 32)]
TINY = [(2, 3, 96), (4, 1, 64)]


def case(place: Place, splits: int, tokens: int, features: int) -> Case:
    def make() -> Arguments:
        return {"parts": place.randn(splits, tokens, features).float(), "out": place.randn(tokens, features)}

    return Case(
        label=f"{splits} x {tokens} x {features}",
        make=make,
        bytes=(4 * splits + 2) * tokens * features,
        changes=("out",),
        torch={"sum and to": lambda a: lambda: a["parts"].sum(0).to(place.dtype)},
    )
