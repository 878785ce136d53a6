#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# llguidance 1.9.1: an integer in a JSON Schema is rounded to the nearest float of 64 bits, without a word.
#
# A schema says `{"const": 9007199254740993}`, which is 2^53 + 1. JSON puts no limit on integers, and one would expect a
# grammar that takes this text alone, or an error. It takes 9007199254740992 and refuses the number that the schema has.
# `enum` does the same, and `minimum` and `maximum` move as well, so that a range above 2^53 takes what lies outside it.
#
# Users meet it with ids of 64 bits (snowflakes, database keys): a constrained answer is complete, ends by itself, and
# does not validate against its own schema.
#
# Seen (whether the grammar takes the text as a whole):
#   {"const": 9007199254740993}                      9007199254740993 no    9007199254740992 yes
#   {"enum": [1, 12345678901234567]}                 12345678901234567 no   12345678901234568 yes
#   {"type": "integer", "minimum": 9007199254740993} 9007199254740993 yes   9007199254740992 yes
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip install --quiet llguidance==1.9.1

cat >integers.py <<'PYTHON'
import json

from llguidance import LLMatcher, LLTokenizer

tokenizer = LLTokenizer("byte")  # a token for each byte


def takes(schema, text):
    matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_json_schema(json.dumps(schema)), log_level=0)
    return matcher.consume_tokens(tokenizer.tokenize_str(text)) and matcher.is_accepting()


seen = []
for schema, right, wrong in (
    ({"const": 2**53 + 1}, 2**53 + 1, 2**53),
    ({"enum": [1, 12345678901234567]}, 12345678901234567, 12345678901234568),
    ({"type": "integer", "minimum": 2**53 + 1}, 2**53 + 1, 2**53),
):
    taken = [takes(schema, str(number)) for number in (right, wrong)]
    words = "   ".join(f"{number} {'yes' if yes else 'no'}" for number, yes in zip((right, wrong), taken))
    print(f"{json.dumps(schema):49}{words}")
    seen.append(taken)
assert seen == [[False, True], [False, True], [True, True]], "changed: integers are taken otherwise"
PYTHON
venv/bin/python integers.py
