# SPDX-License-Identifier: Apache-2.0
"""A product with a weight, whole: of few tokens by our own kernels (see linear_blocks), of more by cuBLAS."""

import torch
from torch import Tensor

from lightllm_backend.kernels.linear.linear_blocks import blocks_for
from lightllm_backend.kernels.linear.linear_splits import launch
from lightllm_backend.kernels.linear.sum_splits import sum_splits


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    tokens, out_features = x.shape[0], weight.shape[0]
    if out is None:
        out = torch.empty((tokens, out_features), dtype=x.dtype, device=x.device)
    blocks = blocks_for(x, weight)
    if blocks is None:
        return torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)
    if blocks.splits == 1:
        launch(x, weight, bias, out.unsqueeze(0), blocks)
        return out
    parts = torch.empty((blocks.splits, tokens, out_features), dtype=torch.float32, device=x.device)
    launch(x, weight, bias, parts, blocks)
    return sum_splits(parts, out)
