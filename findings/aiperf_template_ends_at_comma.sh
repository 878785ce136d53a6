#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# aiperf 0.13.0: a payload template on the command line ends at its first comma.
#
# NVIDIA's tutorials benchmark Triton server's generate endpoint with --endpoint-type template and
#   --extra-inputs payload_template:'{"text_input": {{ text|tojson }}, "max_tokens": {{ max_tokens }}}'
# aiperf splits the value of each --extra-inputs at commas, inside of braces and quotation marks too, so that the
# template is '{"text_input": {{ text|tojson }}', and the rest becomes a further input called '"max_tokens"'.
#
# Users meet it with any template of two keys. Nothing is said of the command line: aiperf starts its services, builds
# the dataset, and then fails with "Template did not render valid JSON ... unexpected end of data", followed by the
# first 100 characters of what was rendered, in which nothing is wrong. A template with one key works, beside the others
# as inputs of their own.
#
# Seen:
#   two keys: [('payload_template', '{"text_input": {{ text|tojson }}'), ('"max_tokens"', '{{ max_tokens }}}')]
#   one key:  [('payload_template', '{"text_input": {{ text|tojson }}}'), ('max_tokens', 8)]
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip install --quiet aiperf==0.13.0

venv/bin/python - <<'PYTHON'
from aiperf.config.loader.parsing import parse_str_or_dict_as_tuple_list  # what --extra-inputs goes through

two = parse_str_or_dict_as_tuple_list(
    ['payload_template:{"text_input": {{ text|tojson }}, "max_tokens": {{ max_tokens }}}']
)
one = parse_str_or_dict_as_tuple_list(['payload_template:{"text_input": {{ text|tojson }}}', "max_tokens:8"])
print("two keys:", two)
print("one key: ", one)
assert dict(two)["payload_template"] == '{"text_input": {{ text|tojson }}', "changed: the template is another"
assert dict(one) == {"payload_template": '{"text_input": {{ text|tojson }}}', "max_tokens": 8}, "changed: one key"
PYTHON
