#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# transformers 5.23.0: EXAONE 4's configuration fails for two of the three kinds of sliding_window_pattern it documents.
#
# Exaone4Config's documentation says of sliding_window_pattern that None means no sliding window, and that "LLLG" is the
# same as 4; the types it declares, and checks, are those. But the list of layer types, if it is not given, is made with
# (layer + 1) % sliding_window_pattern: Python's own TypeError for None and for a str. sliding_window=None makes the
# pattern 0, whatever it was, and so the modulo a ZeroDivisionError. None of the messages names a key.
#
# Users meet it when they read a config.json of a model without a window, or with a pattern of letters, that has no
# layer_types, or build a small model for a test. With layer_types beside it each of these works.
#
# Seen (Exaone4Config(num_hidden_layers=4, ...)):
#   sliding_window_pattern=4: sliding, sliding, sliding, full
#   sliding_window_pattern='LLLG': TypeError: unsupported operand type(s) for %: 'int' and 'str'
#   sliding_window_pattern=None: TypeError: unsupported operand type(s) for %: 'int' and 'NoneType'
#   sliding_window=None: ZeroDivisionError: integer modulo by zero
#   sliding_window=None, with layer_types: full, full, full, full
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip install --quiet transformers==5.23.0

TRANSFORMERS_VERBOSITY=error venv/bin/python - <<'PYTHON'
from transformers import Exaone4Config


def outcome(**keys):
    try:
        config = Exaone4Config(num_hidden_layers=4, **keys)
    except (TypeError, ZeroDivisionError) as error:
        return f"{type(error).__name__}: {error}"
    return ", ".join(name.removesuffix("_attention") for name in config.layer_types)


for title, keys, expected in (
    ("sliding_window_pattern=4", {"sliding_window_pattern": 4}, "sliding, sliding, sliding, full"),
    ("sliding_window_pattern='LLLG'", {"sliding_window_pattern": "LLLG"}, "TypeError"),
    ("sliding_window_pattern=None", {"sliding_window_pattern": None}, "TypeError"),
    ("sliding_window=None", {"sliding_window": None}, "ZeroDivisionError"),
    (
        "sliding_window=None, with layer_types",
        {"sliding_window": None, "layer_types": ["full_attention"] * 4},
        "full, full, full, full",
    ),
):
    seen = outcome(**keys)
    print(f"{title}: {seen}")
    assert seen.partition(":")[0] == expected, f"changed: expected {expected}"
PYTHON
