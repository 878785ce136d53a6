#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# transformers 5.23.0 (torch 2.13.0): a sliding_window in LLaMA's config.json changes generate alone.
#
# LLaMA has no sliding window: its class does not read the key, and the forward pass gives the same logits with it and
# without. generate makes its cache by the config, though, and a config with sliding_window gets layers that forget K
# and V of earlier tokens. So once a text is longer than that, generate with its cache (the default) continues it
# otherwise than the forward pass does, and than generate without a cache. Nothing warns.
#
# Users meet it with models that were converted from Mistral and kept its keys: whether a server agrees with
# transformers depends on which of the two it is compared with.
#
# Seen:
#   logits with and without the key: equal
#   generate without a cache:        equal
#   generate with its cache:         different
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip install --quiet torch==2.13.0 transformers==5.23.0

TRANSFORMERS_VERBOSITY=error venv/bin/python - <<'PYTHON'
import torch
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 256, "initializer_range": 0.4, "eos_token_id": None,
}
PROMPT = torch.randint(0, 64, (1, 40), generator=torch.Generator().manual_seed(1))


def model(**more):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES, **more)).eval()


def answer(one, use_cache):
    return one.generate(PROMPT, max_new_tokens=12, do_sample=False, pad_token_id=0, use_cache=use_cache)


def word(same):
    return "equal" if same else "different"


plain, windowed = model(), model(sliding_window=8)
with torch.no_grad():
    logits = torch.equal(plain(PROMPT).logits, windowed(PROMPT).logits)
without, cached = (torch.equal(answer(plain, use), answer(windowed, use)) for use in (False, True))
print(f"logits with and without the key: {word(logits)}")
print(f"generate without a cache:        {word(without)}")
print(f"generate with its cache:         {word(cached)}")
assert torch.equal(answer(plain, True), answer(plain, False)), "without the key, the cache makes a difference too"
assert logits, "changed: the forward pass heeds the key"
assert without, "changed: generate without a cache heeds the key"
assert not cached, "changed: the cache no longer heeds the key"
PYTHON
