# SPDX-License-Identifier: Apache-2.0
"""Writes the client's options, client/lightllm_client/options.py, from the option table.

    python -m lightllm_backend.client_options

The client has every option that has a tensor, but for those in `_LEFT_OUT`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lightllm_backend.option_table import OPTIONS
from lightllm_backend.request import DEFAULTS

CLIENT_OPTIONS = Path(__file__).parents[1] / "client" / "lightllm_client" / "options.py"

# The first three are arguments of the client's methods, stop_token_ids does what end_id does, return_log_probs what
# return_cumulative_logprob does, and structured_output what the guide does.
_LEFT_OUT = (
    "text_input", "input_ids", "stream", "end_id", "return_cumulative_logprob",
    "guided_decoding_guide_type", "guided_decoding_guide",
)  # fmt: skip
# Options whose tensors hold JSON, with the types that the client takes.
_JSON = {"logit_bias": "Mapping[int, float]", "structured_output": "Mapping[str, Any]"}
_PYTHON_TYPES = {"BOOL": "bool", "INT32": "int", "UINT64": "int", "FP32": "float", "STRING": "str"}
_HEAD = '''\
# SPDX-License-Identifier: Apache-2.0
"""The options of a request. `python -m lightllm_backend.client_options` writes this file from the server's table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict


class Options(TypedDict, total=False):
    """The options of a request. An option that is left out is not sent, and the server's default holds."""

'''


def source() -> str:
    """Generate the text of the client's options.py."""
    tensors = {name: option.tensor for name, option in OPTIONS.items() if option.tensor and name not in _LEFT_OUT}
    datatypes = {name: "BYTES" if datatype == "STRING" else datatype for name, (datatype, _) in tensors.items()}
    lists = [name for name, (_, size) in tensors.items() if size == -1]
    annotations = []
    for name, (datatype, _) in tensors.items():
        one = _JSON.get(name, _PYTHON_TYPES[datatype])
        annotations.append(f"    {name}: {f'{one} | Sequence[{one}]' if name in lists else one}\n")
    return (
        _HEAD
        + "".join(annotations)
        + "\n\n# The type of each option's input tensor.\n"
        + _dictionary("DATATYPES", datatypes.items())
        + "\n# These take any number of values; one value needs no list around it.\n"
        + f"LISTS = ({', '.join(map(_quoted, lists))})\n"
        + "\n# These are sent as JSON.\n"
        + f"JSON = ({', '.join(map(_quoted, _JSON))})\n"
        + "\n# What other servers and libraries call these options.\n"
        + _dictionary("OTHER_NAMES", ((other, name) for name in tensors for other in OPTIONS[name].other_names))
        + "\n# What each option does, as the command line says it.\n"
        + _dictionary("HELP", ((name, _help(name)) for name in tensors))
    )


def _help(name: str) -> str:
    """The table's help with the server's default, in the words of a command line."""
    text, default = OPTIONS[name].help, DEFAULTS.get(name)
    if default == () and name not in _JSON:
        return f"{text} May be given several times."
    if default in (None, "", ()):
        return text
    if isinstance(default, bool):
        default = "yes" if default else "no"
    return f"{text.removesuffix('.')} (default: {default})."


def _dictionary(name: str, items: Iterable[tuple[str, str]]) -> str:
    lines = "".join(f"    {_quoted(key)}: {_quoted(value)},\n" for key, value in items)
    return f"{name}: dict[str, str] = {{\n{lines}}}\n"


def _quoted(text: str) -> str:
    if '"' in text or "\\" in text:
        raise ValueError(f"{text!r} needs escapes, which the formatter may write otherwise")
    return f'"{text}"'


if __name__ == "__main__":
    CLIENT_OPTIONS.write_text(source())
