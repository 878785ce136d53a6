# SPDX-License-Identifier: Apache-2.0
"""Recognises directories and files that are no Hugging Face model, and says in the error what they are."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from lightllm_backend.models.config_fields import ConfigFields
from lightllm_backend.models.errors import ModelError

ADAPTER_CONFIG = "adapter_config.json"

# Last parts of tensor names that only quantised checkpoints have, by the tool that writes them.
QUANTIZED_TENSORS = {
    "GPTQ or AWQ": ("qweight", "qzeros", "g_idx"),
    "bitsandbytes": ("absmax", "quant_map", "nested_absmax", "bitsandbytes__nf4", "bitsandbytes__fp4", "SCB"),
    "compressed-tensors": ("weight_packed",),
    "scales": ("weight_scale", "weight_scale_inv", "input_scale", "scales"),
}


def refuse_other_directories(directory: Path) -> None:
    """Raise ModelError for a directory whose own files say that it is something else."""
    if not (directory / "config.json").exists():
        if (directory / ADAPTER_CONFIG).exists():
            raise adapter_error(directory)
        if (directory / "params.json").exists():
            raise ModelError(
                f"{directory}: holds a model in its authors' own format (params.json); "
                "a Hugging Face model directory, with a config.json, is needed: convert it"
            )


def adapter_error(directory: Path) -> ModelError:
    """The error for a PEFT adapter without its base model."""
    config = directory / ADAPTER_CONFIG
    base = ConfigFields.read(config).get("base_model_name_or_path") if config.exists() else None
    return ModelError(
        f"{directory}: holds a PEFT adapter and no model; a whole model is needed: merge the adapter into "
        f"{base or 'its base model'} (peft's merge_and_unload, then save_pretrained)"
    )


def refuse_quantized(path: Path, names: Collection[str]) -> None:
    """Raise ModelError if a tensor of the file has a name that only quantised checkpoints have."""
    for method, endings in QUANTIZED_TENSORS.items():
        if name := next((name for name in names if name.rpartition(".")[2] in endings), None):
            raise ModelError(
                f"{path}: {name} belongs to weights quantised with {method}, of which config.json says nothing; a "
                "quantization_config that does, or an unquantised checkpoint, is needed"
            )
