# SPDX-License-Identifier: Apache-2.0
"""ModelConfig: what config.json and generation_config.json of a Hugging Face directory say about a model.

Standard library only, so that settings can be checked where torch must not be imported. Every way in which a
directory can be wrong is a ModelError.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightllm_backend.models.errors import ModelError
from lightllm_backend.models.registry import check_architecture

__all__ = ["ModelConfig", "ModelError", "RopeScaling"]

ROPE_TYPES = ("default", "linear", "dynamic", "llama3")


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
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling
    attention_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool
    max_positions: int
    torch_dtype: str | None
    bos_id: int | None
    eos_ids: tuple[int, ...]

    @classmethod
    def from_directory(cls, path: str | Path) -> ModelConfig:
        """Read the model directory's config.json, and generation_config.json if there is one."""
        directory = Path(path)
        if not directory.is_dir():
            raise ModelError(f"{directory}: there is no such directory; a Hugging Face model directory is needed")
        config = _Fields.read(directory / "config.json")
        architecture = _architecture(config)
        _refuse_unsupported(config)
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
        eos_ids = config.token_ids("eos_token_id")
        generation_path = directory / "generation_config.json"
        if generation_path.exists():
            eos_ids += _Fields.read(generation_path).token_ids("eos_token_id")
        return cls(
            architecture=architecture,
            vocab_size=config.count("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=config.count("intermediate_size"),
            num_layers=config.count("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=config.positive("rms_norm_eps"),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            attention_bias=config.flag("attention_bias", False),
            mlp_bias=config.flag("mlp_bias", False),
            tie_word_embeddings=config.flag("tie_word_embeddings", False),
            max_positions=max_positions,
            torch_dtype=_dtype(config),
            bos_id=next(iter(config.token_ids("bos_token_id")), None),
            eos_ids=tuple(dict.fromkeys(eos_ids)),
        )

    @property
    def max_sequence_length(self) -> int:
        """How many positions the model serves with its RoPE scaling (llama3 configurations count them already)."""
        if self.rope_scaling.rope_type in ("linear", "dynamic"):
            return int(self.max_positions * self.rope_scaling.factor)
        return self.max_positions


_REQUIRED = object()


@dataclass(frozen=True)
class _Fields:
    """One JSON object whose values are taken by kind; an absent or null value takes the default, or is an error."""

    path: Path
    values: dict[str, Any]
    prefix: str = ""

    @classmethod
    def read(cls, path: Path) -> _Fields:
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ModelError(
                f"{path}: there is no such file; a Hugging Face model directory with one is needed"
            ) from error
        except OSError as error:
            raise ModelError(f"{path}: cannot be read: {error}") from error
        except ValueError as error:
            raise ModelError(f"{path}: is not valid JSON: {error}") from error
        if not isinstance(values, dict):
            raise ModelError(f"{path}: holds a JSON {type(values).__name__}; an object is needed")
        return cls(path, values)

    def error(self, key: str, needed: str) -> ModelError:
        is_there = self.values.get(key) is not None
        value = f"is {self.values[key]!r}" if is_there else "is missing"
        return ModelError(f"{self.path}: {self.prefix}{key} {value}; {needed}")

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def child(self, key: str) -> _Fields:
        """The object under `key`; an empty one if it is absent."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.error(key, "an object is needed")
        return _Fields(self.path, value or {}, f"{self.prefix}{key}.")

    def count(self, key: str, default: object = _REQUIRED) -> int:
        value = self.values.get(key)
        if value is None and default is not _REQUIRED:
            value = default
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.error(key, "an integer above 0 is needed")
        return value

    def positive(self, key: str, default: object = _REQUIRED) -> float:
        value = self.values.get(key)
        if value is None and default is not _REQUIRED:
            value = default
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value) or value <= 0:
            raise self.error(key, "a number above 0 is needed")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, "true or false is needed")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        """A token id or a list of them."""
        value = self.values.get(key)
        ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
        if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in ids):
            raise self.error(key, "a token id or a list of token ids is needed")
        return ids


def _architecture(config: _Fields) -> str:
    names = config.values.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise config.error("architectures", "a list with the name of the model's class is needed")
    try:
        check_architecture(names[0])
    except ModelError as error:
        raise ModelError(f"{config.path}: {error}") from error
    return names[0]


def _refuse_unsupported(config: _Fields) -> None:
    """Settings that would change the computation and that no model here knows."""
    if config.has("quantization_config"):
        raise config.error("quantization_config", "an unquantised checkpoint is needed")
    if (config.values.get("hidden_act") or "silu") not in ("silu", "swish"):
        raise config.error("hidden_act", "'silu' is needed")
    if config.values.get("rope_interleaved"):
        raise config.error("rope_interleaved", "false is needed")


def _dtype(config: _Fields) -> str | None:
    """The checkpoint's dtype by its plain name; transformers 5 writes `dtype` for what was `torch_dtype`."""
    key = "dtype" if config.has("dtype") else "torch_dtype"
    value = config.values.get(key)
    if value is None:
        return None
    if not isinstance(value, str):
        raise config.error(key, "the name of a dtype, for example 'bfloat16', is needed")
    return value.removeprefix("torch.")


def _rope(config: _Fields, max_positions: int) -> tuple[float, RopeScaling]:
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
