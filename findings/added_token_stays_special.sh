#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# tokenizers 0.23.3: a special token that is added again with special=False is still skipped, until a reload.
#
# Adding a token again replaces its flags: get_added_tokens_decoder and the saved JSON say special=false afterwards. The
# token stays in the set of tokens that decode skips, though. The same tokenizer, saved and loaded again, reports the
# same flags and decodes the same ids to another text.
#
# Users meet it when they make a control token visible, such as the start of a tool call or of a reasoning part, by
# adding it again as an ordinary token: the running process still hides it, and a restart from the saved file shows it.
#
# Seen:
#   special:               True, decoded to 'a'
#   added with False:      False, decoded to 'a'
#   saved and loaded:      False, decoded to 'a<call>'
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip install --quiet tokenizers==0.23.3

venv/bin/python - <<'PYTHON'
from tokenizers import AddedToken, Tokenizer, decoders, models


def flag_and_text(title, tokenizer):
    seen = tokenizer.get_added_tokens_decoder()[1].special, tokenizer.decode([0, 1], skip_special_tokens=True)
    print(f"{title + ':':22} {seen[0]}, decoded to {seen[1]!r}")
    return seen


tokenizer = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
tokenizer.decoder = decoders.Fuse()
tokenizer.add_special_tokens([AddedToken("<call>", special=True, normalized=False)])
assert flag_and_text("special", tokenizer) == (True, "a"), "changed: a special token is not skipped"
tokenizer.add_tokens([AddedToken("<call>", special=False, normalized=False)])
assert flag_and_text("added with False", tokenizer) == (False, "a"), "changed: the token is no longer skipped"
loaded = Tokenizer.from_str(tokenizer.to_str())
assert flag_and_text("saved and loaded", loaded) == (False, "a<call>"), "changed: the loaded tokenizer skips the token"
PYTHON
