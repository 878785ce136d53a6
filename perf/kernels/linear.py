# SPDX-License-Identifier: Apache-2.0
"""Products with the weights of LLaMA-7B, of LLaMA-2-70B on one of four GPUs, and of BLOOM-7B1, at sizes of batches."""

from __future__ import annotations

from torch.nn import functional

from perf.kernels.measure import Arguments, Case, Place

# By what they are: output and input features.
LLAMA_7B = {
    "qkv": (12288, 4096),
    "output": (4096, 4096),
    "gate_up": (22016, 4096),
    "down": (4096, 11008),
    "head": (32000, 4096),
}
LLAMA_70B_TP4 = {
    "70B qkv": (2560, 8192),
    "70B output": (8192, 2048),
    "70B gate_up": (14336, 8192),
    "70B down": (8192, 7168),
    "70B head": (8000, 8192),
}
BLOOM_7B1 = {"BLOOM up": (16384, 4096), "BLOOM down": (4096, 16384), "BLOOM head": (250880, 4096)}

SIZES = [
    *((name, tokens, *shape) for name, shape in LLAMA_7B.items() for tokens in (1, 8, 32, 64, 128, 256)),
    *((name, tokens, *shape) for name, shape in LLAMA_70B_TP4.items() for tokens in (1, 32, 128)),
    *((name, tokens, *shape) for name, shape in BLOOM_7B1.items() for tokens in (1, 32, 128)),
]
TINY = [("split", 1, 64, 256), ("whole", 3, 1024, 128), ("left to cuBLAS", 40, 64, 128)]


def case(place: Place, name: str, tokens: int, out_features: int, in_features: int) -> Case:
    def make() -> Arguments:
        return {"x": place.randn(tokens, in_features), "weight": place.randn(out_features, in_features)}

    return Case(
        label=f"{name}, {tokens} x {in_features} x {out_features}",
        make=make,
        bytes=2 * (out_features * in_features + tokens * (in_features + out_features)),
        operations=2 * tokens * in_features * out_features,
        torch={"linear": lambda a: lambda: functional.linear(a["x"], a["weight"])},
    )
