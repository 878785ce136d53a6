# SPDX-License-Identifier: Apache-2.0
"""Recognises directories and files that are no Hugging Face model, and says in the error what they are."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path

from lightllm_backend.models.config_fields import ConfigFields
from lightllm_backend.models.errors import ModelError

ADAPTER_CONFIG = "adapter_config.json"

# Last parts of tensor names that only quantised checkpoints have, by the tool that writes them.
QUANTIZED_TENSORS = {
    "GPTQ or AWQ": ("qweight", "qzeros", "g_idx"),
    "bitsandbytes": ("absmax", "quant_map", "nested_absmax", "bitsandbytes__nf4", "bitsandbytes__fp4", "SCB"),
    "compressed-tensors": ("weight_packed",),
    "torchao": ("_weight_qdata", "_weight_scale", "_weight_zero_point"),
    "optimum-quanto": ("_data", "_scale", "_shift"),
    "scales": ("weight_scale", "weight_scale_inv", "input_scale", "scales"),
}


# Keys that transformers 5.23 heeds in the config.json of any class, and the values with which they change nothing.
FIXED_KEYS: dict[str, tuple[object, ...]] = {
    "is_causal": (True,),
    "is_encoder_decoder": (False, None),
    "use_bidirectional_attention": (False, None),
    "attention_chunk_size": (None,),
    "kv_sharing_modes": (None,),
    "per_layer_config": (None, {}),
    "rope_interleaved": (False, None),
}

# Kinds of models that are not served, and the keys and types of layers by which their config.json shows them.
OTHER_KINDS: dict[str, tuple[str, ...]] = {
    "mixtures of experts": (
        "num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size", "num_experts_per_tok",
        "moe_num_experts",
    ),
    "models with linear attention or a state space": (
        "linear_num_value_heads", "mamba_d_state", "mamba_d_conv", "ssm_state_size", "state_size", "lru_width",
        "hybrid_override_pattern", "linear_attn_config", "linear_attention", "mamba", "recurrent", "conv",
    ),
    "models with images, sound or video": (
        "vision_config", "audio_config", "speech_config", "visual", "vision_tower", "mm_vision_tower", "image_token_id",
        "image_token_index", "thinker_config", "embd_layer", "img_processor", "audio_processor",
        "vision_soft_tokens_per_image", "audio_soft_tokens_per_image",
    ),
    "encoders with a decoder": ("encoder_layers", "num_decoder_layers", "encoder_attention_heads"),
}  # fmt: skip


def other_kind(config: ConfigFields) -> str | None:
    """The kind of model that is not served to which this config.json belongs, as far as its keys show it."""
    shown = {key for key, value in config.values.items() if value not in (None, False, 0, {}, [])}
    types = config.get("layer_types") or config.get("layers_block_type")
    shown |= {kind for kind in types if isinstance(kind, str)} if isinstance(types, list) else set()
    return next((kind for kind, signs in OTHER_KINDS.items() if not shown.isdisjoint(signs)), None)


def refuse_other_values(config: ConfigFields) -> None:
    """Raise ModelError for a key by which transformers would compute something else, whatever the class."""
    for key, values in FIXED_KEYS.items():
        if key in config.values and config.values[key] not in values:
            raise config.error(key, f"{json.dumps(values[0])} is needed")


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


def refuse_quantized(path: Path, names: Collection[str], left_out_by: Callable[[str], str]) -> None:
    """Raise ModelError if a tensor of the file has a name that only quantised checkpoints have.

    `left_out_by` tells what leaves the layer of a tensor unquantised, if anything does.
    """
    for method, endings in QUANTIZED_TENSORS.items():
        if name := next((name for name in names if name.rpartition(".")[2] in endings), None):
            raise ModelError(
                f"{path}: {name} belongs to weights quantised with {method}, but "
                f"{left_out_by(name) or 'no quantization_config describes this layer so'}; "
                "a quantization_config that describes it, or an unquantised checkpoint, is needed"
            )
