# SPDX-License-Identifier: Apache-2.0
"""Random weights of 4 and 8 bits, and what they stand for, by the definition in QuantizedWeight's docstring."""

import torch
from torch import Tensor

from lightllm_backend.kernels.quantized.weight import QuantizedWeight, pack_int4

DTYPES = {"int4": torch.int32, "int8": torch.int8, "fp8": torch.float8_e4m3fn}


def random_weight(
    kind: str, out_features: int, in_features: int, group_size: int, device: torch.device, with_zeros: bool = False
) -> QuantizedWeight:
    """With scales that differ by a factor of up to 2, about as large as 1 / sqrt(in_features) together with values."""
    groups = -(-in_features // group_size)
    if kind == "int4":
        values = pack_int4(torch.randint(0, 16, (out_features, in_features)))
    elif kind == "int8":
        values = torch.randint(-127, 128, (out_features, in_features), dtype=torch.int8)
    else:
        values = torch.randn(out_features, in_features).mul(100).clamp(-448, 448).to(torch.float8_e4m3fn)
        values[0, :3] = torch.tensor([448.0, -448.0, 2**-9]).to(torch.float8_e4m3fn)  # the ends, a subnormal number
    spread = {"int4": 4.6, "int8": 73.0, "fp8": 100.0}[kind]
    scales = (torch.rand(groups, out_features) + 1) / (spread * in_features**0.5)
    low, high = (0, 16) if kind == "int4" else (-40, 40)
    zeros = torch.randint(low, high, (groups, out_features), dtype=torch.int8) if with_zeros else None
    return QuantizedWeight(
        values.to(device),
        scales.to(torch.float16 if kind == "int4" else torch.float32).to(device),
        group_size,
        None if zeros is None else zeros.to(device),
    )


def exact(weight: QuantizedWeight) -> Tensor:
    """The weight in float64, number by number."""
    columns = torch.arange(weight.shape[1], device=weight.values.device)
    group = columns // weight.group_size
    values = weight.values.double() if not weight.is_int4 else (weight.values[:, columns // 8] >> columns % 8 * 4) & 15
    zeros = weight.zeros[group].t() if weight.zeros is not None else 8 if weight.is_int4 else 0
    return (values.double() - zeros) * weight.scales[group].t().double()
