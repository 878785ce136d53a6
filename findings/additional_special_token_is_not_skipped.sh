#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# transformers 5.23.0, tokenizers 0.23.3: decode(skip_special_tokens=True) keeps a token that all_special_ids lists.
#
# tokenizer_config.json may declare special tokens that tokenizer.json has as ordinary added tokens. A token declared as
# pad_token (or eos_token) becomes special in the tokenizer below, and decode skips it. A token declared in
# additional_special_tokens (or extra_special_tokens, its name in transformers 5) is listed by extra_special_tokens and
# all_special_ids, but it stays ordinary below, and decode keeps it.
#
# Users meet it as control tokens, such as the end of a tool call, in the text that a server returns, though the model's
# configuration declares them special and the tokenizer object confirms that.
#
# Seen:
#   pad_token:                 in all_special_ids: True, skipped by decode: True
#   additional_special_tokens: in all_special_ids: True, skipped by decode: False
#   extra_special_tokens:      in all_special_ids: True, skipped by decode: False
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip install --quiet transformers==5.23.0 tokenizers==0.23.3

venv/bin/python - <<'PYTHON'
import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import AutoTokenizer

tokenizer = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
tokenizer.decoder = decoders.Fuse()
tokenizer.add_tokens([AddedToken("<call>", normalized=False, special=False)])
tokenizer.save("tokenizer.json")


def listed_and_skipped(key, value):
    Path("tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", key: value}))
    auto = AutoTokenizer.from_pretrained(".")
    text = auto.decode(auto.encode("a<call>"), skip_special_tokens=True)
    assert text in ("a", "a<call>"), f"decode returned {text!r}"
    seen = (auto.convert_tokens_to_ids("<call>") in auto.all_special_ids, text == "a")
    print(f"{key + ':':26} in all_special_ids: {seen[0]}, skipped by decode: {seen[1]}")
    return seen


assert listed_and_skipped("pad_token", "<call>") == (True, True), "changed for pad_token"
for key in ("additional_special_tokens", "extra_special_tokens"):
    assert listed_and_skipped(key, ["<call>"]) == (True, False), f"changed for {key}"
PYTHON
