# SPDX-License-Identifier: Apache-2.0
"""LayerNorm with the addition to the residual: BLOOM's."""

from __future__ import annotations

from torch.nn import functional

from perf.kernels.measure import Arguments, Case, Place

SIZES = [(tokens, 4096) for tokens in (1, 32, 256, 8192)]
TINY = [(2, 96), (3, 128)]


def case(place: Place, tokens: int, dim: int) -> Case:
    def make() -> Arguments:
        x, residual = place.randn(tokens, dim), place.randn(tokens, dim)
        return {"x": x, "weight": place.randn(dim), "bias": place.randn(dim), "eps": 1e-5, "residual": residual}

    return Case(
        label=f"{tokens} x {dim}",
        make=make,
        bytes=2 * (4 * tokens * dim + 2 * dim),
        torch={
            "add_ and layer_norm": lambda a: (
                lambda: functional.layer_norm(a["residual"].add_(a["x"]), (dim,), a["weight"], a["bias"], a["eps"])
            )
        },
        changes=("residual",),
    )
