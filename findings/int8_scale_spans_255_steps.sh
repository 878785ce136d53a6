#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# compressed-tensors 0.20.1: the scale of symmetric int8 is the largest magnitude divided by 127.5, not by 127.
#
# A W8A8 checkpoint says of its activations: int8, symmetric, one dynamic scale a token. One would expect the scale that
# makes the token's largest magnitude 127, as inference engines compute it. compressed-tensors divides the whole range
# by 255 steps, so the largest magnitude becomes 127.5: positive ones are clamped to 127, negative ones may become -128.
#
# Users meet it when they compare an engine with the checkpoint's own model in transformers: every activation is rounded
# to another grid, and logits of small models differ by far more than int8 arithmetic explains.
#
# Seen:
#   magnitude 127: scale 0.99608, 127 becomes 127 steps, -127 becomes -128 steps
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip install --quiet torch==2.13.0 compressed-tensors==0.20.1

venv/bin/python - <<'PYTHON'
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.utils import calculate_qparams

activations = QuantizationArgs(num_bits=8, type="int", strategy="token", dynamic=True, symmetric=True)
scale, zero = calculate_qparams(torch.tensor([-127.0]), torch.tensor([127.0]), activations)
steps = quantize(torch.tensor([[127.0, -127.0]]), scale, zero, activations)[0].int().tolist()
print(f"magnitude 127: scale {scale.item():.5f}, 127 becomes {steps[0]} steps, -127 becomes {steps[1]} steps")
assert abs(scale.item() - 127 / 127.5) < 1e-6, "changed: the scale is another"
assert steps == [127, -128], "changed: the steps are others"
PYTHON
