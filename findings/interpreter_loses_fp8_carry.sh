#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# triton 3.9.0: in the interpreter, every other number that rounds up to a power of two becomes half of that in fp8.
#
# A kernel that stores float32 as tl.float8e4nv is run with TRITON_INTERPRET=1. One would expect the nearest fp8 number,
# as torch converts it: 1.99 becomes 2. It becomes 1. Where rounding carries out of the mantissa, the exponent grows if
# it is even and stays if it is odd, as though the carry were not added but set as a bit: 0.99 and 3.99 are right, 1.99
# and 7.99 are not. And numbers above 448, the largest of the format, do not become 448.
#
# Users meet it when they test kernels of fp8 weights or activations on a machine without a GPU: a few numbers of a
# thousand are wrong by half, which looks like a fault of the kernel.
#
# Seen:
#   number:        0.99   1.99   3.99   7.99    1.9    1.5    448    500
#   torch:            1      2      4      8  1.875    1.5    448    448
#   interpreter:      1      1      4      4  1.875    1.5    448    256
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip install --quiet numpy==2.4.6 torch==2.13.0 triton==3.9.0

cat >kernel.py <<'PYTHON'
import torch
import triton
import triton.language as tl


@triton.jit
def convert(source, target, count: tl.constexpr):
    index = tl.arange(0, count)
    tl.store(target + index, tl.load(source + index).to(tl.float8e4nv))


numbers = torch.tensor([0.99, 1.99, 3.99, 7.99, 1.9, 1.5, 448.0, 500.0])
converted = torch.empty(8, dtype=torch.float8_e4m3fn)
convert[(1,)](numbers, converted, 8)
for title, values in (
    ("number:", numbers),
    ("torch:", numbers.clamp(max=448).to(torch.float8_e4m3fn).float()),
    ("interpreter:", converted.float()),
):
    print(f"{title:12}" + "".join(f"{value:7g}" for value in values.tolist()))
assert converted.float().tolist() == [1, 1, 4, 4, 1.875, 1.5, 448, 256], "changed: the interpreter converts otherwise"
PYTHON
TRITON_INTERPRET=1 venv/bin/python kernel.py
