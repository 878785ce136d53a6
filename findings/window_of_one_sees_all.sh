#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# transformers 5.23.0 (torch 2.13.0): with a sliding_window of 1, generate keeps all tokens in its cache, and sees them.
#
# A query sees as many tokens as sliding_window says, its own included, so with 1 it sees its own alone. The forward
# pass masks the others, and generate without a cache agrees. The cache of a layer with a window keeps the last
# sliding_window - 1 tokens, by the slice [-sliding_window + 1:], which is [0:] for 1: all of them. The mask of a step
# is of the length that a cut cache would have, a single token, and spreads over all that the cache returns. So generate
# with its cache (the default) continues as if there were no window. Nothing warns.
#
# Users meet it when they try a server or a kernel at the least value that the config class takes: transformers, the
# usual reference, contradicts itself there. With 2 and more both ways agree.
#
# Seen (generate with its cache against without, for sliding_window 1, 2, 3):
#   mistral:     different, equal, equal
#   phi3:        different, equal, equal
#   gemma3_text: different, equal, equal
#   tokens in the cache after a prompt of 40, for Mistral: 40, 1, 2
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
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.4, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
}
PROMPT = torch.randint(0, 64, (1, 40), generator=torch.Generator().manual_seed(1))
MODELS = {"mistral": {}, "phi3": {}, "gemma3_text": {"head_dim": 16}}
WINDOWS = (1, 2, 3)


def model(kind, window):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES, **MODELS[kind], sliding_window=window)
    return AutoModelForCausalLM.from_config(config).eval()


def answer(one, use_cache):
    return one.generate(PROMPT, max_new_tokens=12, do_sample=False, use_cache=use_cache)


for kind in MODELS:
    models = [model(kind, window) for window in WINDOWS]
    same = [torch.equal(answer(one, True), answer(one, False)) for one in models]
    print(f"{kind + ':':12} " + ", ".join("equal" if equal else "different" for equal in same))
    assert not same[0], f"changed: for {kind}, both ways agree with a window of 1"
    assert all(same[1:]), f"changed: for {kind}, both ways differ with wider windows, too"

with torch.no_grad():
    kept = [model("mistral", window)(PROMPT).past_key_values.layers[0].keys.shape[2] for window in WINDOWS]
print("tokens in the cache after a prompt of 40, for Mistral:", ", ".join(map(str, kept)))
assert kept == [40, 1, 2], "changed: the cache keeps other numbers of tokens"
PYTHON
