# SPDX-License-Identifier: Apache-2.0
"""The gated activation of LLaMA's feed-forward layer; 7168 features are 70B's on one of four GPUs."""

from __future__ import annotations

from torch.nn import functional

from perf.kernels.measure import Case, Place

SIZES = [*((tokens, 11008) for tokens in (1, 32, 256, 8192)), (32, 7168), (256, 7168)]
TINY = [(2, 96)]


def case(place: Place, tokens: int, features: int) -> Case:
    return Case(
        label=f"{tokens} x {features}",
        make=lambda: {"gate_up": place.randn(tokens, 2 * features)},
        bytes=2 * 3 * tokens * features,
        torch={
            "silu and *": lambda a: lambda: functional.silu(a["gate_up"][:, :features]) * a["gate_up"][:, features:]
        },
    )
