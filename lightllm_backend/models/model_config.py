# SPDX-License-Identifier: Apache-2.0
"""ModelConfig: what config.json and generation_config.json of a Hugging Face directory say about a model.

Standard library only, so that settings can be checked where torch must not be imported. Every way in which a
directory can be wrong is a ModelError.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightllm_backend.models.config_fields import ConfigFields
from lightllm_backend.models.errors import ModelError
from lightllm_backend.models.registry import ARCHITECTURES, check_architecture

__all__ = ["ModelConfig", "ModelError", "RopeScaling"]

ROPE_TYPES = ("default", "linear", "dynamic", "llama3")
LAYER_TYPES = ("full_attention", "sliding_attention")

# Positions of a model that has no limit of its own; how many are served is for the settings to say.
UNLIMITED_POSITIONS = 2**17


@dataclass(frozen=True)
class RopeScaling:
    """How rotary embeddings are stretched over more positions than the model was first trained on."""

    rope_type: str = "default"
    factor: float = 1.0
    # The rest belongs to llama3.
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 0


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model. Sizes are the whole model's, whatever part of it a rank holds."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    tie_word_embeddings: bool
    max_positions: int
    torch_dtype: str | None
    bos_id: int | None
    eos_ids: tuple[int, ...]
    # What a family has or has not. Which of it an architecture heeds is for its own file to say.
    attention_bias: bool = False
    mlp_bias: bool = False
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = RopeScaling()
    sliding_window: int | None = None
    use_sliding_window: bool = False
    sliding_layers: tuple[bool, ...] = ()

    @classmethod
    def from_directory(cls, path: str | Path) -> ModelConfig:
        """Read the model directory's config.json, and generation_config.json if there is one."""
        directory = Path(path)
        if not directory.is_dir():
            raise ModelError(f"{directory}: there is no such directory; a Hugging Face model directory is needed")
        config = ConfigFields.read(directory / "config.json")
        architecture = _architecture(config)
        if config.has("quantization_config"):
            raise config.error("quantization_config", "an unquantised checkpoint is needed")
        eos_ids = config.token_ids("eos_token_id")
        generation_path = directory / "generation_config.json"
        if generation_path.exists():
            eos_ids += ConfigFields.read(generation_path).token_ids("eos_token_id")
        return cls(
            architecture=architecture,
            vocab_size=config.count("vocab_size"),
            torch_dtype=_dtype(config),
            bos_id=next(iter(config.token_ids("bos_token_id")), None),
            eos_ids=tuple(dict.fromkeys(eos_ids)),
            **DIALECTS[ARCHITECTURES[architecture].dialect](config),
        )

    @property
    def max_sequence_length(self) -> int:
        """How many positions the model serves with its RoPE scaling (llama3 configurations count them already)."""
        if self.rope_scaling.rope_type in ("linear", "dynamic"):
            return int(self.max_positions * self.rope_scaling.factor)
        return self.max_positions


def _llama(config: ConfigFields) -> dict[str, Any]:
    """What LLaMA's config.json says, and those of all the models that have followed it."""
    if (config.values.get("hidden_act") or "silu") not in ("silu", "swish"):
        raise config.error("hidden_act", "'silu' is needed")
    if config.values.get("rope_interleaved"):
        raise config.error("rope_interleaved", "false is needed")
    num_heads = config.count("num_attention_heads")
    num_kv_heads = config.count("num_key_value_heads", num_heads)
    hidden_size = config.count("hidden_size")
    if not config.has("head_dim") and hidden_size % num_heads != 0:
        raise config.error("hidden_size", f"a multiple of num_attention_heads, {num_heads}, or head_dim is needed")
    head_dim = config.count("head_dim", hidden_size // num_heads)
    if num_heads % num_kv_heads != 0:
        raise config.error("num_key_value_heads", f"a divisor of num_attention_heads, {num_heads}, is needed")
    if head_dim % 2 != 0:
        raise config.error("head_dim", f"rotary embeddings need an even head_dim, this one is {head_dim}")
    max_positions = config.count("max_position_embeddings")
    rope_theta, rope_scaling = _rope(config, max_positions)
    num_layers = config.count("num_hidden_layers")
    return {
        "hidden_size": hidden_size,
        "intermediate_size": config.count("intermediate_size"),
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "norm_eps": config.positive("rms_norm_eps"),
        "tie_word_embeddings": config.flag("tie_word_embeddings", False),
        "max_positions": max_positions,
        "attention_bias": config.flag("attention_bias", False),
        "mlp_bias": config.flag("mlp_bias", False),
        "rope_theta": rope_theta,
        "rope_scaling": rope_scaling,
        "sliding_window": config.count("sliding_window") if config.has("sliding_window") else None,
        "use_sliding_window": config.flag("use_sliding_window", False),
        "sliding_layers": _sliding_layers(config, num_layers),
    }


def _bloom(config: ConfigFields) -> dict[str, Any]:
    """What BLOOM's config.json says; it has gone by two names for most of it."""
    if config.flag("apply_residual_connection_post_layernorm", False):
        raise config.error("apply_residual_connection_post_layernorm", "false is needed")
    hidden_key, heads_key = config.either("n_embed", "hidden_size"), config.either("num_attention_heads", "n_head")
    hidden_size, num_heads = config.count(hidden_key), config.count(heads_key)
    if hidden_size % num_heads != 0:
        raise config.error(hidden_key, f"a multiple of {heads_key}, {num_heads}, is needed")
    return {
        "hidden_size": hidden_size,
        "intermediate_size": 4 * hidden_size,
        "num_layers": config.count(config.either("num_hidden_layers", "n_layer")),
        "num_heads": num_heads,
        "num_kv_heads": num_heads,
        "head_dim": hidden_size // num_heads,
        "norm_eps": config.positive("layer_norm_epsilon"),
        "tie_word_embeddings": config.flag("tie_word_embeddings", True),
        "max_positions": config.count("seq_length", UNLIMITED_POSITIONS),
        "attention_bias": True,
        "mlp_bias": True,
    }


# How the config.json of an architecture is written: by the registry's word for it.
DIALECTS: dict[str, Callable[[ConfigFields], dict[str, Any]]] = {"llama": _llama, "bloom": _bloom}


def _architecture(config: ConfigFields) -> str:
    names = config.values.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise config.error("architectures", "a list with the name of the model's class is needed")
    try:
        check_architecture(names[0])
    except ModelError as error:
        raise ModelError(f"{config.path}: {error}") from error
    return names[0]


def _dtype(config: ConfigFields) -> str | None:
    """The checkpoint's dtype by its plain name; transformers 5 writes `dtype` for what was `torch_dtype`."""
    key = "dtype" if config.has("dtype") else "torch_dtype"
    value = config.values.get(key)
    if value is None:
        return None
    if not isinstance(value, str):
        raise config.error(key, "the name of a dtype, for example 'bfloat16', is needed")
    return value.removeprefix("torch.")


def _sliding_layers(config: ConfigFields, num_layers: int) -> tuple[bool, ...]:
    """Which layers a sliding window is for: as `layer_types` says, else all from `max_window_layers` on."""
    types = config.values.get("layer_types")
    if types is None:
        first = config.count("max_window_layers", 0, least=0)
        return tuple(layer >= first for layer in range(num_layers))
    if not isinstance(types, list) or len(types) != num_layers or not all(kind in LAYER_TYPES for kind in types):
        raise config.error("layer_types", f"one of {' | '.join(LAYER_TYPES)} for each of {num_layers} layers is needed")
    return tuple(kind == "sliding_attention" for kind in types)


def _rope(config: ConfigFields, max_positions: int) -> tuple[float, RopeScaling]:
    """Base and scaling, from `rope_parameters` (transformers 5) or from `rope_theta` and `rope_scaling`."""
    scaling = config.child("rope_parameters" if config.has("rope_parameters") else "rope_scaling")
    theta_owner = scaling if scaling.has("rope_theta") else config
    theta = theta_owner.positive("rope_theta", 10000.0)
    for owner in (config, scaling):
        if owner.values.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise owner.error("partial_rotary_factor", "1 is needed")
    key = "rope_type" if scaling.has("rope_type") else "type"
    rope_type = scaling.values.get(key, "default")
    if rope_type not in ROPE_TYPES:
        raise scaling.error(key, f"known: {', '.join(ROPE_TYPES)}")
    if rope_type == "default":
        return theta, RopeScaling()
    factor = scaling.positive("factor")
    if factor < 1:
        raise scaling.error("factor", "a number of at least 1 is needed")
    if rope_type != "llama3":
        return theta, RopeScaling(rope_type, factor)
    low, high = scaling.positive("low_freq_factor"), scaling.positive("high_freq_factor")
    if low >= high:
        raise scaling.error("low_freq_factor", f"a number below high_freq_factor, {high}, is needed")
    original = scaling.count("original_max_position_embeddings", max_positions)
    return theta, RopeScaling(rope_type, factor, low, high, original)
