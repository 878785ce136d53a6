# SPDX-License-Identifier: Apache-2.0
"""Writes the settings of the Helm chart's values.schema.json from config.py.

    python -m lightllm_backend.chart_schema

So Helm refuses an unknown or wrong setting before a pod starts. The rest of the schema is written by hand and kept.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from lightllm_backend.config import EngineConfig

SCHEMA = Path(__file__).parents[1] / "deploy" / "helm" / "lightllm" / "values.schema.json"
# The chart sets these itself, or they have no meaning in its container.
OWNED = {
    "host", "http_port", "grpc_port", "metrics_port", "openai_port", "model_dir", "api_key_file", "worker_python",
    "nnodes", "node_rank", "master_addr", "master_port",
}  # fmt: skip
REQUIRED = ("tp", "shutdown_timeout_s")  # the number of GPUs and the pod's grace period follow from them
_TYPES = {"int": "integer", "float": "number", "bool": "boolean", "bool | str": ["boolean", "string"], "str": "string"}


def updated(text: str) -> str:
    """The text of the schema with the settings made anew."""
    schema = json.loads(text)
    schema["properties"]["settings"] = {
        "type": "object",
        "additionalProperties": False,
        "required": list(REQUIRED),
        "properties": {
            setting.name: _property(setting.type, setting.metadata)
            for setting in fields(EngineConfig)
            if setting.name not in OWNED
        },
    }
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def _property(annotation: Any, metadata: Any) -> dict[str, Any]:
    kind, allowed = str(annotation).removesuffix(" | None"), metadata["allowed"]
    choices = allowed.split(" | ") if kind == "str" else []
    value: dict[str, Any] = {"type": _TYPES.get(kind, "string")}  # several values are one string, as in the environment
    if len(choices) > 1:
        value = {"enum": choices}
    if kind == "int" and allowed.startswith("a whole number ≥ "):
        value["minimum"] = int(allowed.removeprefix("a whole number ≥ "))
    return {**value, "description": metadata["help"] + (f"; allowed: {allowed}" if allowed else "")}


if __name__ == "__main__":
    SCHEMA.write_text(updated(SCHEMA.read_text()))
