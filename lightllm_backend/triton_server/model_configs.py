# SPDX-License-Identifier: Apache-2.0
"""Writes the inputs, outputs and wiring of every config.pbtxt in model_repository from the table of tensors.

    python -m lightllm_backend.triton_server.model_configs

The rest of a config.pbtxt is written by hand and kept.
"""

from __future__ import annotations

import re
from pathlib import Path

from lightllm_backend.triton_server.tensors import (
    BATCHED_ENSEMBLE,
    BATCHED_OUTPUT_NAMES,
    MODEL_TENSORS,
    REQUIRED_INPUTS,
    Tensors,
)

REPOSITORY = Path(__file__).parents[2] / "model_repository"

# Names in an ensemble of the tensors between its steps whose own names are those of the client's tensors.
_BETWEEN = {"tokenizer": {"input_ids": "prompt_ids"}}


def updated(model: str, text: str) -> str:
    """The text of the model's config.pbtxt with the generated blocks made anew."""
    inputs, outputs = MODEL_TENSORS[model]
    optional = set(inputs) - REQUIRED_INPUTS.get(model, set())
    blocks = {"output [": _tensors("output", model, outputs)}
    if inputs:
        blocks["input ["] = _tensors("input", model, inputs, optional)
    if 'platform: "ensemble"' in text:
        blocks["ensemble_scheduling {"] = _wiring(BATCHED_OUTPUT_NAMES if model == BATCHED_ENSEMBLE else {})
    for first_line, block in blocks.items():
        end = "]" if first_line.endswith("[") else "}"
        [old] = re.findall(rf"^{re.escape(first_line)}\n.*?^{end}\n", text, flags=re.MULTILINE | re.DOTALL)
        text = text.replace(old, block)
    return text


def _tensors(kind: str, model: str, tensors: Tensors, optional: set[str] | frozenset[str] = frozenset()) -> str:
    lines = []
    for name, (datatype, size) in tensors.items():
        dims = f"dims: [ {size} ]"
        if model == BATCHED_ENSEMBLE and kind == "input":
            dims = f"dims: [ 1, {size} ], reshape: {{ shape: [ {size} ] }}"
        mark = ", optional: true" if name in optional else ""
        lines.append(f'  {{ name: "{name}", data_type: TYPE_{datatype}, {dims}{mark} }}')
    return f"{kind} [\n" + ",\n".join(lines) + "\n]\n"


def _wiring(output_names: dict[str, str]) -> str:
    """The steps, each of which gets what the one before makes; tensors for direct callers of a step are left out."""
    steps, sources = [], {name: name for name in MODEL_TENSORS["tokenizer"][0]}
    followers = {"tokenizer": "generation", "generation": "detokenizer"}
    for model in ("tokenizer", "generation", "detokenizer"):
        inputs, outputs = MODEL_TENSORS[model]
        if model in followers:
            outputs = {name: tensor for name, tensor in outputs.items() if name in MODEL_TENSORS[followers[model]][0]}
        targets = {name: name for name in outputs} | _BETWEEN.get(model, {})
        if model not in followers:
            targets |= output_names
        maps = [("input_map", name, sources[name]) for name in inputs if name in sources]
        maps += [("output_map", name, targets[name]) for name in outputs]
        lines = [f'      {kind} {{ key: "{name}", value: "{value}" }}' for kind, name, value in maps]
        steps.append("\n".join(["    {", f'      model_name: "{model}"', "      model_version: -1", *lines, "    }"]))
        sources = targets
    return "ensemble_scheduling {\n  step [\n" + ",\n".join(steps) + "\n  ]\n}\n"


def main() -> None:
    for model in MODEL_TENSORS:
        path = REPOSITORY / model / "config.pbtxt"
        path.write_text(updated(model, path.read_text()))


if __name__ == "__main__":
    main()
