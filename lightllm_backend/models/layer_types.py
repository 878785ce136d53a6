# SPDX-License-Identifier: Apache-2.0
"""What differs from layer to layer, windows and rotary embeddings, from config.json. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightllm_backend.models.config_fields import ConfigFields
from lightllm_backend.models.rope import Rope, read_rope, read_ropes_by_layer_type

LAYER_TYPES = FULL, SLIDING = "full_attention", "sliding_attention"


def read_layers(config: ConfigFields, num_layers: int, head_dim: int, rope_types: Mapping[str, str]) -> dict[str, Any]:
    """The values of ModelConfig that say so, by name; `rope_types` as for read_rope."""
    positions = config.count("max_position_embeddings", least=2)  # a prompt, and an answer
    if config.knows("rope_local_base_freq"):
        by_type, warnings = read_ropes_by_layer_type(config, head_dim)
        ropes = tuple(by_type[layer_type] for layer_type in _layer_types(config, num_layers))
    else:
        rope, warnings = read_rope(config, head_dim, rope_types)
        unrotated = Rope(0)
        ropes = tuple(rope if rotates else unrotated for rotates in _rotating_layers(config, num_layers))
        positions = rope.stretched(positions)
    windows = _sliding_window(config, num_layers)
    _check_uniform_types(config, num_layers)
    return {"ropes": ropes, "warnings": tuple(warnings), "max_sequence_length": positions, **windows}


def _rotating_layers(config: ConfigFields, num_layers: int) -> list[bool]:
    """Which layers have rotary embeddings: all, or those of `no_rope_layers` with a 1, else all but every nth."""
    if not config.knows("no_rope_layers"):
        return [True] * num_layers
    listed = config.get("no_rope_layers")
    if listed is None:
        interval = config.count("no_rope_layer_interval")
        return [(layer + 1) % interval != 0 for layer in range(num_layers)]
    if not isinstance(listed, list) or len(listed) < num_layers or any(value not in (0, 1) for value in listed):
        needed = f"1, or 0 for a layer without rotary embeddings, is needed for each of {num_layers} layers"
        raise config.error("no_rope_layers", needed)
    return [value == 1 for value in listed[:num_layers]]


def _sliding_window(config: ConfigFields, num_layers: int) -> dict[str, Any]:
    """The sliding window and which layers have it."""
    is_off = config.knows("use_sliding_window") and not config.flag("use_sliding_window")
    if is_off or not config.knows("sliding_window") or not config.has("sliding_window"):
        types = config.get("layer_types") if config.knows("layer_types") else None
        if types is not None and SLIDING in _layer_types(config, num_layers):
            key, needed = ("use_sliding_window", "true") if is_off else ("sliding_window", "a window")
            raise config.error(key, f"{needed} is needed for the sliding_attention in layer_types")
        return {}
    sliding = tuple(layer_type == SLIDING for layer_type in _layer_types(config, num_layers))
    return {"sliding_window": config.count("sliding_window"), "sliding_layers": sliding}


def _check_uniform_types(config: ConfigFields, num_layers: int) -> None:
    """Refuse `layer_types` that contradict a class without this key, which has its window in all layers or in none."""
    if config.knows("layer_types") or not config.knows("sliding_window"):
        return
    served = SLIDING if config.has("sliding_window") else FULL
    if config.has("layer_types") and config.get("layer_types") != [served] * num_layers:
        raise config.error(
            "layer_types", f"{served} is needed for each of {num_layers} layers, as sliding_window makes them"
        )


def _layer_types(config: ConfigFields, num_layers: int) -> list[str]:
    """The type of each layer: `layer_types`, else by the class's rule of how they alternate."""
    types = config.get("layer_types") if config.knows("layer_types") else None
    if types is None:
        if config.knows("sliding_window_pattern"):
            pattern = config.count("sliding_window_pattern")
            return [SLIDING if (layer + 1) % pattern else FULL for layer in range(num_layers)]
        if config.knows("no_rope_layers"):
            return [FULL if rotates else SLIDING for rotates in _rotating_layers(config, num_layers)]
        first = config.count("max_window_layers", least=0) if config.knows("max_window_layers") else 0
        return [SLIDING if layer >= first else FULL for layer in range(num_layers)]
    if not isinstance(types, list) or len(types) != num_layers or not all(kind in LAYER_TYPES for kind in types):
        raise config.error("layer_types", f"one of {' | '.join(LAYER_TYPES)} for each of {num_layers} layers is needed")
    return types
