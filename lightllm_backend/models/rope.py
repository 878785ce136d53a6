# SPDX-License-Identifier: Apache-2.0
"""Rope: the rotary embeddings of a layer, as config.json describes them. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lightllm_backend.models.config_fields import ConfigFields

# The keys that each type of RoPE reads, beside those of all types.
ROPE_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor", "original_max_position_embeddings", "attention_factor", "mscale", "mscale_all_dim", "beta_fast",
        "beta_slow", "truncate",
    ),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings", "factor", "attention_factor"),
}  # fmt: skip
KEYS_OF_ALL = ("rope_type", "type", "rope_theta", "partial_rotary_factor")

# The types by their names in config.json. Phi-3's class has two, of which one had other names at first.
ROPE_TYPES: Mapping[str, str] = {name: name for name in ROPE_KEYS}
PHI3_ROPE_TYPES: Mapping[str, str] = {
    "default": "default", "longrope": "longrope", "su": "longrope", "yarn": "longrope"
}  # fmt: skip

# Far above all models; longer stretches would overflow.
MAX_FACTOR = 2.0**16
ORIGINAL = "original_max_position_embeddings"


@dataclass(frozen=True)
class Rope:
    """The rotary embeddings of a layer: which dimensions of a head turn, how fast, and over how many positions."""

    dim: int  # the dimensions that turn; the others, behind them, pass through; 0: none turns
    theta: float = 10000.0
    rope_type: str = "default"
    factor: float = 1.0  # by which positions are stretched
    original_max_positions: int = 0  # before that
    attention_factor: float = 1.0  # of cosines and sines
    # For llama3 alone.
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    # For yarn alone: turns over the original positions between which frequencies are blended, and whether the pairs of
    # dimensions at these bounds are whole ones.
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    # For longrope alone: how much slower each pair of dimensions turns, in sequences of at most and of more than the
    # original positions.
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    def depends_on_length(self, max_length: int) -> bool:
        """Whether a token's rotation depends on the length of its sequence, which is at most `max_length`."""
        is_long = max_length > self.original_max_positions
        return is_long and (self.rope_type == "dynamic" or self.short_factors != self.long_factors)

    def stretched(self, max_positions: int) -> int:
        """The positions that a model with this RoPE serves, from its `max_position_embeddings`."""
        if self.rope_type in ("linear", "dynamic"):
            return int(max_positions * self.factor)
        if self.rope_type == "yarn":
            return int(self.original_max_positions * self.factor)
        return max_positions  # includes the stretch


def read_rope(config: ConfigFields, head_dim: int, types: Mapping[str, str]) -> tuple[Rope, list[str]]:
    """The RoPE that all layers share, and warnings of what has no effect.

    It is in `rope_scaling` or, as transformers 5 calls it, `rope_parameters`. If a file has both, transformers 5.23
    reads `rope_scaling` alone, and so do we. If neither has the base, it is the `rope_theta` beside them. `types` are
    the names of RoPE types that the class knows, and what they mean.
    """
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    warnings = []
    if key == "rope_scaling" and config.get("rope_parameters") not in (None, {}, config.get("rope_scaling")):
        unused = config.get("rope_parameters")
        warnings.append(f"{config.path}: rope_scaling counts, and not rope_parameters beside it, {unused!r}")
    parameters = config.child(key)
    for name, value in parameters.values.items():
        if isinstance(value, dict):
            raise parameters.error(name, "the same parameters for all layers are needed")
    theta = (parameters if "rope_theta" in parameters.values else config).positive("rope_theta")
    owner_of_original = config if config.has(ORIGINAL) else parameters
    rope = _read(config, parameters, theta, head_dim, types, owner_of_original)
    return rope, [*warnings, *_unread(config, parameters, rope)]


def read_ropes_by_layer_type(config: ConfigFields, head_dim: int) -> tuple[dict[str, Rope], list[str]]:
    """The RoPE of each type of layer, as Gemma 3 has them, and warnings of what has no effect.

    transformers 5 has the parameters of each type within `rope_parameters`. Files of version 4 have the bases in
    `rope_theta` and `rope_local_base_freq`, and a `rope_scaling` for the layers with full attention.
    """
    parameters = config.child("rope_parameters")
    bases = {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"}
    if others := [name for name in parameters.values if name not in bases]:
        raise parameters.error(others[0], f"parameters within {' and '.join(bases)} are needed")
    ropes: dict[str, Rope] = {}
    warnings: list[str] = []
    for layer_type, base in bases.items():
        own = parameters.child(layer_type)
        if layer_type == "full_attention" and config.get("rope_scaling"):
            scaling = config.child("rope_scaling")
            if "rope_type" not in scaling.values:
                raise scaling.error("rope_type", "a type is needed: beside rope_theta, `type` is not read")
            own = replace(scaling, values={**own.values, **scaling.values})
        theta = own.positive("rope_theta") if "rope_theta" in own.values else config.positive(base)
        # One length of longrope for all layers: a sequence that outgrows it computes them all anew.
        types = {name: name for name in ROPE_TYPES if name != "longrope"}
        rope = ropes[layer_type] = _read(config, own, theta, head_dim, types, own)
        if not rope.truncate:
            raise own.error("truncate", "true is needed: transformers does not read it here")
        warnings += _unread(config, own, rope)
    return ropes, warnings


def _read(
    config: ConfigFields,
    parameters: ConfigFields,
    theta: float,
    head_dim: int,
    types: Mapping[str, str],
    owner_of_original: ConfigFields,
) -> Rope:
    key = "rope_type" if parameters.has("rope_type") else "type"
    name = parameters.get(key)
    if (name is not None and (not isinstance(name, str) or name not in types)) or (
        name is None and parameters.has("factor")
    ):
        raise parameters.error("rope_type" if name is None else key, f"known: {', '.join(types)}")
    rope = Rope(_dim(config, parameters, head_dim), theta, "default" if name is None else types[name])
    if rope.rope_type == "default":
        return rope if config.knows("partial_rotary_factor") else replace(rope, dim=head_dim)
    if not config.knows("partial_rotary_factor") and rope.dim != head_dim:
        owner = parameters if parameters.has("partial_rotary_factor") else config
        raise owner.error("partial_rotary_factor", "1 is needed")
    positions = config.count("max_position_embeddings")
    if rope.rope_type == "linear":
        return replace(rope, factor=_factor(parameters))
    if rope.rope_type == "dynamic":
        if rope.dim <= 2:
            raise parameters.error(key, f"more than {rope.dim} dimensions of a head are needed")
        return replace(rope, factor=_factor(parameters), original_max_positions=positions)
    original = owner_of_original.count(ORIGINAL, null=positions)
    read = {"llama3": _llama3, "yarn": _yarn, "longrope": _longrope}[rope.rope_type]
    return replace(rope, original_max_positions=original, **read(parameters, rope, original, positions))


def _dim(config: ConfigFields, parameters: ConfigFields, head_dim: int) -> int:
    """The first dimensions of a head, which turn."""
    owner = parameters if parameters.has("partial_rotary_factor") else config
    if not owner.has("partial_rotary_factor"):
        return head_dim
    if (share := owner.positive("partial_rotary_factor")) > 1:
        raise owner.error("partial_rotary_factor", "a number of at most 1 is needed")
    return int(head_dim * share)


def _factor(parameters: ConfigFields) -> float:
    factor = parameters.positive("factor")
    if factor < 1:
        raise parameters.error("factor", "a number of at least 1 is needed")
    if factor > MAX_FACTOR:
        raise parameters.error("factor", f"a number of at most {MAX_FACTOR:.0f} is needed")
    return factor


def _llama3(parameters: ConfigFields, _rope: Rope, _original: int, _positions: int) -> dict[str, Any]:
    low, high = parameters.positive("low_freq_factor"), parameters.positive("high_freq_factor")
    if low >= high:
        raise parameters.error("low_freq_factor", f"a number below high_freq_factor, {high}, is needed")
    return {"factor": _factor(parameters), "low_freq_factor": low, "high_freq_factor": high}


def _yarn(parameters: ConfigFields, rope: Rope, original: int, positions: int) -> dict[str, Any]:
    """The written factor counts for all, whatever the positions say; null stands for their ratio."""
    if rope.theta <= 1:
        raise parameters.error("rope_theta", "YaRN needs a base above 1")
    if "factor" in parameters.values and not parameters.has("factor"):
        factor = positions / original
    else:
        factor = _factor(parameters)
    # Zero stands for the default, and is no value of the others.
    fast = parameters.positive("beta_fast") if parameters.get("beta_fast") else rope.beta_fast
    slow = parameters.positive("beta_slow") if parameters.get("beta_slow") else rope.beta_slow
    if fast < slow:
        raise parameters.error("beta_fast", f"a number of at least beta_slow, {slow}, is needed")
    truncate = parameters.values.get("truncate", True)
    if not isinstance(truncate, bool):
        raise parameters.error("truncate", "true or false is needed")

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if parameters.has("attention_factor"):
        attention = parameters.positive("attention_factor")
    elif parameters.get("mscale") and parameters.get("mscale_all_dim"):
        attention = magnitude(parameters.positive("mscale")) / magnitude(parameters.positive("mscale_all_dim"))
    else:
        attention = magnitude(1.0)
    return {
        "factor": factor,
        "attention_factor": attention,
        "beta_fast": fast,
        "beta_slow": slow,
        "truncate": truncate,
    }


def _longrope(parameters: ConfigFields, rope: Rope, original: int, positions: int) -> dict[str, Any]:
    factor = _factor(parameters) if parameters.has("factor") else positions / original
    if parameters.has("attention_factor"):
        attention = parameters.positive("attention_factor")
    elif factor <= 1:
        attention = 1.0
    elif original == 1:
        raise parameters.error(ORIGINAL, "an integer of at least 2 is needed")
    else:
        attention = math.sqrt(1 + math.log(factor) / math.log(original))
    pairs = len(range(0, rope.dim, 2))
    return {
        "factor": factor,
        "attention_factor": attention,
        "short_factors": parameters.positives("short_factor", pairs),
        "long_factors": parameters.positives("long_factor", pairs),
    }


def _unread(config: ConfigFields, parameters: ConfigFields, rope: Rope) -> Iterator[str]:
    """Warnings of keys that transformers' class does not heed."""
    for name in parameters.values:
        if name not in (*KEYS_OF_ALL, *ROPE_KEYS[rope.rope_type]):
            yield f"{config.path}: {parameters.prefix}{name} is not read for RoPE of the type {rope.rope_type!r}"
    for owner in (config, parameters):
        if owner.get("partial_rotary_factor") not in (None, 1, 1.0) and not config.knows("partial_rotary_factor"):
            yield f"{config.path}: {owner.prefix}partial_rotary_factor is not read: all dimensions of a head turn"
