#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# llguidance 1.9.1: where a grammar allows nothing more, the mask has the end of sequence, and the matcher takes it.
#
# A grammar may have dead ends: a rule that refers to nothing but itself, a class of characters that is empty, a letter
# that no token of the vocabulary spells. validate_grammar finds nothing wrong with them. At a dead end the text is not
# complete (is_accepting() is false) and no token may follow. One would expect an error, or an empty mask. The mask has
# one token, EOS, and consume_token(EOS) returns True, after which is_stopped() is true, as after a complete text. Only
# who asks get_error() or stop_reason() after every mask learns of it. In any other place of an incomplete text,
# consume_token(EOS) returns False.
#
# Users meet it with recursive schemas that were meant to have a last level: the answer is empty or cut off, ends by
# itself with the reason "stop", and is no document of the schema.
#
# Seen (the text so far, the only token in the next mask, and what the matcher says of it):
#   {"$ref": "#"}           ''   EOS   taken True, stopped True, accepting False, NoExtensionBias
#   a[^\s\S]                ''   EOS   taken True, stopped True, accepting False, NoExtensionBias
#   start: "a" x / x: x     'a'  EOS   taken True, stopped True, accepting False, NoExtensionBias
#   start: "a" "b"          'a'  b     EOS taken False
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip install --quiet llguidance==1.9.1 numpy

venv/bin/python - <<'PYTHON'
import numpy as np
from llguidance import LLMatcher, LLTokenizer

tokenizer = LLTokenizer("byte")  # a token for each byte, and EOS
EOS = tokenizer.eos_token


def allowed(matcher):
    mask = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
    return np.unpackbits(mask, bitorder="little").nonzero()[0].tolist()


def matcher_after(grammar, text):
    assert LLMatcher.validate_grammar(grammar, tokenizer) == "", "changed: the grammar is found to be wrong"
    matcher = LLMatcher(tokenizer, grammar, log_level=0)
    for byte in text.encode():
        assert byte in allowed(matcher)
        assert matcher.consume_token(byte)
    assert not matcher.is_error() and not matcher.is_stopped(), "changed: a dead end shows before a mask is made"
    return matcher


for shown, grammar, text in (
    ('{"$ref": "#"}', LLMatcher.grammar_from_json_schema('{"$ref": "#"}'), ""),
    (r"a[^\s\S]", LLMatcher.grammar_from_regex(r"a[^\s\S]"), ""),
    ('start: "a" x / x: x', LLMatcher.grammar_from_lark('start: "a" x\nx: x'), "a"),
):
    matcher = matcher_after(grammar, text)
    assert allowed(matcher) == [EOS], "changed: another mask"
    reason, taken = matcher.get_error().splitlines()[0], matcher.consume_token(EOS)
    seen = taken, matcher.is_stopped(), matcher.is_accepting()
    print(f"{shown:23} {text!r:4} EOS   taken {seen[0]}, stopped {seen[1]}, accepting {seen[2]}, {reason}")
    assert seen == (True, True, False), "changed: the end of an incomplete text is not taken"
    assert reason == "NoExtensionBias", "changed: another reason"

matcher = matcher_after(LLMatcher.grammar_from_lark('start: "a" "b"'), "a")
assert allowed(matcher) == [ord("b")]
taken = matcher.consume_token(EOS)
print(f'start: "a" "b"          {"a"!r:4} b     EOS taken {taken}')
assert not taken, "changed: the end is taken anywhere"
PYTHON
