#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# transformers 5.23.0, tokenizers 0.23.3: token flags in tokenizer_config.json override those in tokenizer.json.
#
# tokenizer.json is complete by itself, and says of each added token whether it is special and whether it takes the
# space on its left (lstrip). transformers adds every token of tokenizer_config.json's added_tokens_decoder again over
# it, so the flags there win, silently. The same folder then means two tokenizers: one for transformers, another for
# programs that read tokenizer.json with the tokenizers library.
#
# Users meet it with checkpoints whose two files disagree, as after an edit of one of them: the same prompt has other
# token ids, and a token that one server hides (skip_special_tokens) is in the text of another.
#
# Seen (for the text "a <tool>b"):
#   tokenizers:   ['a', ' ', '<tool>', 'b'] decoded to 'a <tool>b'
#   transformers: ['a', '<tool>', 'b'] decoded to 'ab'
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

tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, " ": 2}, merges=[]))
tokenizer.decoder = decoders.Fuse()
tokenizer.add_tokens([AddedToken("<tool>", normalized=False, special=False, lstrip=False)])
tokenizer.save("tokenizer.json")
flags = {"single_word": False, "lstrip": True, "rstrip": False, "normalized": False, "special": True}
Path("tokenizer_config.json").write_text(
    json.dumps(
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "added_tokens_decoder": {"3": {"content": "<tool>", **flags}},
        }
    )
)

text = "a <tool>b"
encoding = Tokenizer.from_file("tokenizer.json").encode(text)
plain = tokenizer.decode(encoding.ids, skip_special_tokens=True)
print(f"tokenizers:   {encoding.tokens} decoded to {plain!r}")
auto = AutoTokenizer.from_pretrained(".")
ids = auto.encode(text, add_special_tokens=False)
tokens, decoded = auto.convert_ids_to_tokens(ids), auto.decode(ids, skip_special_tokens=True)
print(f"transformers: {tokens} decoded to {decoded!r}")
assert (encoding.tokens, plain) == (["a", " ", "<tool>", "b"], text), "changed: tokenizers reads other flags"
assert tokens == ["a", "<tool>", "b"], "changed: lstrip of tokenizer_config.json no longer wins"
assert decoded == "ab", "changed: special of tokenizer_config.json no longer wins"
PYTHON
