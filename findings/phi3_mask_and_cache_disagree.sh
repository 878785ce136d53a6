#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# transformers 5.23.0 (torch 2.13.0): generate fails for a Phi-3 with a sliding_window and layer_types of both kinds.
#
# Phi-3 has one mask for all its layers, with the window if sliding_window is set, and does not read layer_types. The
# cache, which is of one kind for all models, goes by layer_types if config.json has them: a layer of full_attention
# keeps all tokens, one of sliding_attention the last ones. So as soon as a text is longer than the window, the mask of
# a step fits one kind of layer and not the other, and torch reports sizes that differ, naming neither key. Without a
# cache generate works, and answers as if there were no layer_types.
#
# Users meet it when they take a config.json of another class of theirs, such as Qwen3, over to Phi-3's: the model
# loads, nothing warns, and short prompts are answered.
#
# Seen (a window of 8, the first of two layers with full_attention):
#   no layer_types, cache:                 as without
#   layer_types, no cache:                 as without layer_types
#   layer_types, cache, a prompt of 3:     as without layer_types
#   layer_types, cache, a prompt of 40:    RuntimeError: The size of tensor a (41) must match the size of tensor b (8)
#                                          at non-singleton dimension 3
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip install --quiet torch==2.13.0 transformers==5.23.0

TRANSFORMERS_VERBOSITY=error HF_HUB_DISABLE_PROGRESS_BARS=1 venv/bin/python - <<'PYTHON'
import torch
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.4, "bos_token_id": 1,
    "eos_token_id": None, "pad_token_id": 0, "sliding_window": 8,
}
PROMPT = torch.randint(0, 64, (1, 40), generator=torch.Generator().manual_seed(1))


def model(**more):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("phi3", **SIZES, **more)).eval()


def answer(one, prompt=PROMPT, count=4, use_cache=True):
    return one.generate(prompt, max_new_tokens=count, do_sample=False, use_cache=use_cache)


def report(title, same, expected):
    print(f"{title + ':':38} {expected if same else 'different'}")
    assert same, f"changed: not {expected}"


plain, mixed = model(), model(layer_types=["full_attention", "sliding_attention"])
short = PROMPT[:, :3]
without_cache = answer(plain, use_cache=False)
report("no layer_types, cache", torch.equal(answer(plain), without_cache), "as without")
same = torch.equal(answer(mixed, use_cache=False), without_cache)
report("layer_types, no cache", same, "as without layer_types")
same = torch.equal(answer(mixed, short), answer(plain, short))
report("layer_types, cache, a prompt of 3", same, "as without layer_types")
try:
    answer(mixed)
except RuntimeError as error:
    print(f"{'layer_types, cache, a prompt of 40:':38} RuntimeError: {error}")
    assert "must match the size" in str(error), "changed: another error"
else:
    raise SystemExit("changed: generate works with its cache")
PYTHON
