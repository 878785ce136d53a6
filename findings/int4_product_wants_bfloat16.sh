#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# torch 2.13.0: on a CPU, the product with 4-bit weights takes float16 and float32 and is vectorised for bfloat16 alone.
#
# `_weight_int4pack_mm_for_cpu` is what weight-only int4 comes down to on a CPU. It accepts activations in three types and
# gives right results in each. In bfloat16 it beats the dense product, as fewer bytes should; in float16, which most AWQ
# and GPTQ checkpoints ask for, and in float32 a plain loop runs, without a warning: 30 to 50 times slower, and 10 to 20
# times slower than the same product with weights that are not quantised.
#
# Users meet it when they quantise a model to save memory traffic and it becomes an order of magnitude slower, until they
# load it in bfloat16.
#
# Seen (one thread, AVX-512, 1 token, a weight of 1536 x 576, least of 30):
#   bfloat16  4 bits    41 us, dense   110 us
#   float16   4 bits  2159 us, dense    99 us
#   float32   4 bits  1322 us, dense   119 us
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip install --quiet torch==2.13.0 numpy

venv/bin/python - <<'PYTHON'
import time

import torch

torch.set_num_threads(1)
assert torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"), "needs a CPU with AVX2"
values = torch.randint(0, 16, (1536, 576), dtype=torch.int32)
packed = torch._convert_weight_to_int4pack_for_cpu(values, 1)
scales_and_zeros = torch.stack((torch.rand(18, 1536) / 64, torch.zeros(18, 1536)), -1)
weight = (values - 8) * scales_and_zeros[:, :, 0].t().repeat_interleave(32, 1)


def microseconds(call):
    call()
    times = []
    for _ in range(30):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e6 * min(times)


took = {}
for dtype in (torch.bfloat16, torch.float16, torch.float32):
    x, dense, of_groups = torch.randn(1, 576).to(dtype), weight.to(dtype), scales_and_zeros.to(dtype)
    product = torch._weight_int4pack_mm_for_cpu(x, packed, 32, of_groups)
    expected = x.float() @ weight.t()
    assert (product.float() - expected).norm() < 0.02 * expected.norm(), "changed: a result is wrong"
    took[dtype] = microseconds(lambda: torch._weight_int4pack_mm_for_cpu(x, packed, 32, of_groups))
    name, plain = str(dtype).removeprefix("torch."), microseconds(lambda: torch.nn.functional.linear(x, dense))
    print(f"{name:8}  4 bits {took[dtype]:5.0f} us, dense {plain:5.0f} us")
assert took[torch.float16] > 5 * took[torch.bfloat16], "changed: float16 is quick"
assert took[torch.float32] > 5 * took[torch.bfloat16], "changed: float32 is quick"
PYTHON
