#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# gptqmodel 7.6.0 (transformers 5.24.0, torch 2.13.0): its fp8 checkpoints have the name, the configuration and the shape
# of everybody's fp8 in blocks, and scales that are the reciprocals.
#
# DeepSeek's and Qwen's checkpoints made `quant_method` fp8 with `weight_block_size` and tensors weight_scale_inv common:
# transformers and vLLM multiply a block's weights by its weight_scale_inv. GPTQModel writes the same keys and names,
# divides by what it calls weight_scale_inv, and says so in one further key, weight_scale_semantics, which transformers
# does not read. GPTQModel reads its checkpoint back well. In transformers the same directory loads, with weights that
# are too large by the square of the scale, here 30 million times.
#
# Users meet it when they serve a model that GPTQModel made fp8: everything loads, and answers are noise.
#
# Seen (the largest weight of a layer, of the model and as each loads the checkpoint):
#   {'quant_method': 'fp8', 'weight_block_size': [128, 128], 'weight_scale_semantics': 'inverse'}
#   model        0.086113
#   GPTQModel    0.0858896
#   transformers 2.56901e+06
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip install --quiet torch==2.13.0 transformers==5.24.0 gptqmodel==7.6.0

cat >fp8.py <<'PYTHON'
import json
import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["GPTQMODEL_CPU_WORKERS"] = "2"  # the default on 2 CPUs, 1, is refused when the module is used
import torch
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.quantization.config import FP8Config
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LAYER = "model.layers.0.self_attn.q_proj"
torch.manual_seed(0)
sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
dense = LlamaForCausalLM(LlamaConfig(vocab_size=128, **sizes))
dense.save_pretrained("dense")
words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(128)}, unk_token="w0"))
PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w1").save_pretrained("dense")

settings = FP8Config(weight_scale_method="block", weight_block_size=[128, 128], device="cpu")
model = GPTQModel.load("dense", settings)
model.quantize()
model.save("fp8")
with open("fp8/config.json") as file:
    config = json.load(file)["quantization_config"]
print({key: config.get(key) for key in ("quant_method", "weight_block_size", "weight_scale_semantics")})

own = GPTQModel.load("fp8", backend=BACKEND.TORCH, device="cpu").model.get_submodule(LAYER).dequantize_weight()
theirs = AutoModelForCausalLM.from_pretrained("fp8", dtype=torch.float32).get_submodule(LAYER).weight
largest = [float(weight.abs().max()) for weight in (dense.get_submodule(LAYER).weight, own, theirs)]
for name, value in zip(("model", "GPTQModel", "transformers"), largest):
    print(f"{name:12} {value:g}")
assert config["quant_method"] == "fp8", "changed: the checkpoint has another method"
assert abs(largest[1] / largest[0] - 1) < 0.1, "changed: GPTQModel does not read its own checkpoint"
assert largest[2] > 1000 * largest[0], "changed: transformers reads the same weights"
PYTHON
venv/bin/python fp8.py
