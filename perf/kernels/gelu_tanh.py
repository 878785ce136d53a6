# SPDX-License-Identifier: Apache-2.0
"""The activation of BLOOM's feed-forward layer."""

from __future__ import annotations

from torch.nn import functional

from perf.kernels.measure import Case, Place

SIZES = [(tokens, 16384) for tokens in (1, 32, 256, 8192)]
TINY = [(2, 96)]


def case(place: Place, tokens: int, features: int) -> Case:
    return Case(
        label=f"{tokens} x {features}",
        make=lambda: {"x": place.randn(tokens, features)},
        bytes=2 * 2 * tokens * features,
        torch={"gelu": lambda a: lambda: functional.gelu(a["x"], approximate="tanh")},
    )
