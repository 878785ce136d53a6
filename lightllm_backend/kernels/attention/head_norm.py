# SPDX-License-Identifier: Apache-2.0
"""HeadNorm: the RMS norm of each head's query and key that some models have before the rotary embedding."""

from typing import NamedTuple

from torch import Tensor


class HeadNorm(NamedTuple):
    """Weights [head_dim] of all heads' queries and of all heads' keys, both of one dtype."""

    q: Tensor
    k: Tensor
    eps: float
