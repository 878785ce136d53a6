# SPDX-License-Identifier: Apache-2.0
"""ModelConfig: the shape of a model, from the config.json and generation_config.json of a Hugging Face directory.

Standard library only, so that processes without torch can check settings. Every fault of a directory is a ModelError.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lightllm_backend.models.config_fields import ConfigFields
from lightllm_backend.models.errors import ModelError
from lightllm_backend.models.layer_types import FULL, read_layers
from lightllm_backend.models.quantization.config import on_the_fly, read_quantization, with_head
from lightllm_backend.models.quantization.scheme import UNQUANTISED, Quantization
from lightllm_backend.models.registry import (
    ARCHITECTURES,
    FORMER_NAMES,
    MODEL_TYPES,
    SAVED_AS_LLAMA,
    check_architecture,
)
from lightllm_backend.models.rope import PHI3_ROPE_TYPES, ROPE_TYPES, Rope
from lightllm_backend.models.unsupported import other_kind, refuse_other_directories, refuse_other_values

__all__ = ["ModelConfig", "ModelError"]

# The keys whose values the shapes of weights must agree with.
SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim",
)  # fmt: skip

# The keys that count beside `text_config` too.
KEYS_OF_THE_WHOLE = (
    "dtype", "torch_dtype", "bos_token_id", "eos_token_id", "tie_word_embeddings", "quantization_config",
)  # fmt: skip

# A checkpoint's dtype, and the one it is served in: no kernel takes float64.
DTYPES = {
    "bfloat16": "bfloat16",
    "float16": "float16",
    "half": "float16",
    "float32": "float32",
    "float": "float32",
    "float64": "float32",
    "double": "float32",
}

# Far above all models; more layers would make later steps run for hours.
MAX_LAYERS = 10_000

# Positions of a model without a limit of its own; settings may lower it.
UNLIMITED_POSITIONS = 2**17


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model. Sizes are those of the whole model, not of a rank."""

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
    max_sequence_length: int  # the positions that the model serves, with its RoPE scaling
    torch_dtype: str | None
    bos_id: int | None
    eos_ids: tuple[int, ...]
    # Options of some families. Each architecture's own file decides which it uses.
    attention_bias: bool = False
    attention_out_bias: bool = False  # of the output projection, where the class has a key for it
    mlp_bias: bool = False
    ropes: tuple[Rope, ...] = ()  # of each layer; empty: the model has no rotary embeddings
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] = ()  # which layers have the window
    attention_scale: float | None = None  # of scores; None: head_dim ** -0.5
    attention_softcap: float | None = None  # c in c * tanh(score / c)
    logit_softcap: float | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0  # of what attention and MLP add to the residual
    logit_divisor: float = 1.0
    quantization: Quantization = UNQUANTISED
    # For the log when the model starts.
    warnings: tuple[str, ...] = field(default=(), compare=False)

    @classmethod
    def from_directory(cls, path: str | Path) -> ModelConfig:
        """Read the model directory's config.json, and generation_config.json if there is one."""
        directory = Path(path)
        if not directory.is_dir():
            raise ModelError(f"{directory}: there is no such directory; a Hugging Face model directory is needed")
        refuse_other_directories(directory)
        config = ConfigFields.read(directory / "config.json")
        architecture = _architecture(config)
        entry = ARCHITECTURES[architecture]
        if entry.has_text_config:
            config = _text_part(config)
        config = config.with_defaults(entry.defaults)
        refuse_other_values(config)
        shape = DIALECTS[entry.dialect](config)
        quantization = read_quantization(directory, config)
        shape["warnings"] = (*shape.get("warnings", ()), *_left_out(config), *quantization.warnings)
        return cls(
            architecture=architecture,
            vocab_size=config.count("vocab_size"),
            torch_dtype=_dtype(config),
            bos_id=next(iter(config.token_ids("bos_token_id")), None),
            eos_ids=_eos_ids(config, directory / "generation_config.json"),
            quantization=quantization,
            **shape,
        )

    def with_weight_dtype(self, weight_dtype: str, head_dtype: str, tp: int) -> ModelConfig:
        """The model with its weights quantised on the fly, as the settings of these names say, for `tp` ranks."""
        shape = self
        if weight_dtype != "auto":
            shares = (self.hidden_size, *(columns // tp for columns in self._split_columns))
            shape = replace(shape, quantization=on_the_fly(weight_dtype, self.quantization, shares))
        if head_dtype != "auto":
            if self.tie_word_embeddings:
                raise ModelError(
                    f"head_dtype is {head_dtype!r}, but the head's weight is that of the embeddings "
                    "(tie_word_embeddings); allowed: 'auto'"
                )
            shape = replace(shape, quantization=with_head(head_dtype, shape.quantization))
        return shape

    def with_grids(self) -> ModelConfig:
        """The model whose weights are multiplied in 4 or 8 bits if those express them."""
        return replace(self, quantization=replace(self.quantization, finds_grids=True))

    @property
    def _split_columns(self) -> tuple[int, int]:
        """The input features of the matrices that ranks split by these."""
        return self.num_heads * self.head_dim, self.intermediate_size

    def check_ranks(self, tp: int) -> None:
        """Raise ModelError if this model cannot be split over `tp` ranks."""
        allowed = [
            ranks
            for ranks in range(1, self.num_heads + 1)
            if self.num_heads % ranks == 0
            and self.intermediate_size % ranks == 0
            and (self.num_kv_heads % ranks == 0 or ranks % self.num_kv_heads == 0)
            and all(self.quantization.splits_into(columns, ranks) for columns in self._split_columns)
        ]
        if tp not in allowed:
            heads = f"{self.num_heads} attention heads, {self.num_kv_heads} KV heads"
            groups = ""
            if self.quantization.has_order:
                groups = " and weights quantised with desc_act (actorder), which cannot be split"
            elif self.quantization.rules:
                groups = " and quantised weights, whose groups and words must stay whole"
            raise ModelError(
                f"tp is {tp}; allowed: {', '.join(map(str, allowed))}, since the model has {heads} and an"
                f" intermediate_size of {self.intermediate_size}{groups}"
            )

    def window(self, layer: int) -> int:
        """The positions that a query of this layer sees, its own included; 0: all."""
        if self.sliding_window is None or not self.sliding_layers[layer]:
            return 0
        # Kernels without a window are faster, and Phi-3's is wider than its longest sequence.
        return self.sliding_window if self.sliding_window < self.max_sequence_length else 0


def _llama(config: ConfigFields, rope_types: Mapping[str, str] = ROPE_TYPES) -> dict[str, Any]:
    """Read a config.json in the style of LLaMA, which most models follow."""
    _check_activation(config)
    num_heads = config.count("num_attention_heads")
    num_kv_heads = config.count("num_key_value_heads", null=num_heads)
    hidden_size = config.count("hidden_size")
    if not config.has("head_dim") and hidden_size % num_heads != 0:
        raise config.error("hidden_size", f"a multiple of num_attention_heads, {num_heads}, or head_dim is needed")
    head_dim = config.count("head_dim", null=hidden_size // num_heads)
    if num_heads % num_kv_heads != 0:
        raise config.error("num_key_value_heads", f"a divisor of num_attention_heads, {num_heads}, is needed")
    if head_dim % 2 != 0:
        raise config.error("head_dim", f"rotary embeddings need an even head_dim, this one is {head_dim}")
    num_layers = config.count("num_hidden_layers", most=MAX_LAYERS)
    return {
        "hidden_size": hidden_size,
        "intermediate_size": config.count("intermediate_size"),
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "norm_eps": config.positive("rms_norm_eps"),
        "tie_word_embeddings": config.flag("tie_word_embeddings"),
        "attention_bias": config.flag("attention_bias"),
        "attention_out_bias": config.flag("attention_out_bias"),
        "mlp_bias": config.flag("mlp_bias"),
        **read_layers(config, num_layers, head_dim, rope_types),
        **_scales(config),
    }


def _phi3(config: ConfigFields) -> dict[str, Any]:
    """Read Phi-3's config.json, whose types of RoPE have names of their own."""
    return _llama(config, PHI3_ROPE_TYPES)


def _gemma3(config: ConfigFields) -> dict[str, Any]:
    """Read Gemma 3's config.json, one key of which transformers 5.23 has but does not heed."""
    if config.has("attn_logit_softcapping"):
        raise config.error("attn_logit_softcapping", "null is needed")
    return _llama(config)


def _exaone4(config: ConfigFields) -> dict[str, Any]:
    """Read EXAONE 4's config.json. Of a model with a window, the layers without it have no rotary embeddings."""
    shape = _llama(config)
    if windows := shape.get("sliding_layers"):
        layers = zip(shape["ropes"], windows, strict=True)
        shape["ropes"] = tuple(rope if has_window else Rope(0) for rope, has_window in layers)
    return shape


def _internlm3(config: ConfigFields) -> dict[str, Any]:
    """Read InternLM3's config.json, which has names of its own for biases. Its class has all of them or none."""
    values = dict(config.values)
    for name, key in (("qkv_bias", "attention_bias"), ("bias", "mlp_bias")):
        if name in values:
            values[key] = values.pop(name)
    shape = _llama(replace(config, values=values))
    if shape["attention_bias"] != shape["mlp_bias"]:
        raise config.error("bias", f"{json.dumps(shape['attention_bias'])} is needed, as qkv_bias says")
    return shape


def _bloom(config: ConfigFields) -> dict[str, Any]:
    """Read BLOOM's config.json, most of whose keys have two names."""
    if config.flag("apply_residual_connection_post_layernorm"):
        raise config.error("apply_residual_connection_post_layernorm", "false is needed")
    hidden_key, heads_key = config.either("n_embed", "hidden_size"), config.either("num_attention_heads", "n_head")
    hidden_size, num_heads = config.count(hidden_key), config.count(heads_key)
    if hidden_size % num_heads != 0:
        raise config.error(hidden_key, f"a multiple of {heads_key}, {num_heads}, is needed")
    return {
        "hidden_size": hidden_size,
        "intermediate_size": 4 * hidden_size,
        "num_layers": config.count(config.either("num_hidden_layers", "n_layer"), most=MAX_LAYERS),
        "num_heads": num_heads,
        "num_kv_heads": num_heads,
        "head_dim": hidden_size // num_heads,
        "norm_eps": config.positive("layer_norm_epsilon"),
        "tie_word_embeddings": config.flag("tie_word_embeddings"),
        "max_sequence_length": config.count("seq_length", null=UNLIMITED_POSITIONS, least=2),
        "attention_bias": True,
        "mlp_bias": True,
    }


# Readers of config.json, by the registry's `dialect`.
DIALECTS: dict[str, Callable[[ConfigFields], dict[str, Any]]] = {
    "llama": _llama,
    "phi3": _phi3,
    "gemma3": _gemma3,
    "exaone4": _exaone4,
    "internlm3": _internlm3,
    "bloom": _bloom,
}


def _left_out(config: ConfigFields) -> Iterator[str]:
    """Warnings of windows that the class does not have, and of sizes that config.json leaves out.

    The default of a size is seldom that of the weights.
    """
    if not config.knows("sliding_window"):
        types = config.get("layer_types")
        has_types = types is not None and not (isinstance(types, list) and all(kind == FULL for kind in types))
        for key, is_set in (("sliding_window", config.has("sliding_window")), ("layer_types", has_types)):
            if is_set:
                yield f"{config.path}: {key} is not read: the class has none, so all tokens are seen"
    for key in SIZES:
        if config.knows(key) and key not in config.values and config.has(key):
            yield f"{config.path}: {key} is missing, which makes it {config.get(key)}"


def _architecture(config: ConfigFields) -> str:
    """The name of the model's class: the first of `architectures`, else the one for `model_type`."""
    names, model_type = config.get("architectures"), config.get("model_type")
    if not isinstance(model_type, (str, type(None))):
        raise config.error("model_type", "the name of a type is needed")
    if not names and model_type is not None:
        if model_type not in MODEL_TYPES:
            kind = other_kind(config)
            known = f"known without architectures: {', '.join(sorted(MODEL_TYPES))}"
            raise config.error("model_type", f"{kind} are not served; {known}" if kind else known)
        return MODEL_TYPES[model_type]
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise config.error("architectures", "a list with the name of the model's class, or else model_type, is needed")
    architecture = FORMER_NAMES.get(names[0], names[0])
    if architecture == "LlamaForCausalLM" and model_type in SAVED_AS_LLAMA:
        architecture = MODEL_TYPES[model_type]
    try:
        check_architecture(architecture)
    except ModelError as error:
        kind = other_kind(config)
        raise ModelError(f"{config.path}: {f'{kind} are not served: ' if kind else ''}{error}") from error
    if model_type in MODEL_TYPES and MODEL_TYPES[model_type] != architecture:
        raise config.error("model_type", f"architectures is {names!r}; both must name the same model")
    return architecture


def _text_part(config: ConfigFields) -> ConfigFields:
    """What a config.json says of the text: `text_config`, and keys of the whole model, which go before those within."""
    text = config.child("text_config")
    whole = {key: config.values[key] for key in KEYS_OF_THE_WHOLE if config.values.get(key) is not None}
    return replace(text, values={**text.values, **whole})


def _eos_ids(config: ConfigFields, generation_path: Path) -> tuple[int, ...]:
    """The ids that end a text: those of both files, or the class's default if neither has any."""
    ids = config.token_ids("eos_token_id")
    if not generation_path.exists():
        return tuple(dict.fromkeys(ids))
    more = ConfigFields.read(generation_path).token_ids("eos_token_id")
    if more and "eos_token_id" not in config.values:
        ids = ()
    return tuple(dict.fromkeys(ids + more))


def _dtype(config: ConfigFields) -> str | None:
    """The dtype to serve the checkpoint in. transformers 5 writes `dtype`, older versions `torch_dtype`."""
    key = config.either("dtype", "torch_dtype")
    word = config.get(key)
    if word is None:
        return None
    name = word.removeprefix("torch.") if isinstance(word, str) else ""
    if name not in DTYPES:
        raise config.error(key, f"allowed: {', '.join(DTYPES)}")
    return DTYPES[name]


def _check_activation(config: ConfigFields) -> None:
    """Refuse an activation of the MLP that the class's file does not compute."""
    if config.knows("hidden_activation"):
        if config.get("hidden_activation") != "gelu_pytorch_tanh":
            raise config.error("hidden_activation", "'gelu_pytorch_tanh' is needed")
    elif config.get("hidden_act") not in ("silu", "swish"):
        raise config.error("hidden_act", "'silu' is needed")


def _scales(config: ConfigFields) -> dict[str, float]:
    """The factors and soft caps of classes that have them."""
    scales = {}
    if config.knows("query_pre_attn_scalar"):
        scales["attention_scale"] = config.positive("query_pre_attn_scalar") ** -0.5
    names = {
        "attention_multiplier": "attention_scale",
        "attn_logit_softcapping": "attention_softcap",
        "final_logit_softcapping": "logit_softcap",
        "embedding_multiplier": "embedding_multiplier",
        "residual_multiplier": "residual_multiplier",
        "logits_scaling": "logit_divisor",
    }
    for key, name in names.items():
        if config.knows(key) and (config.has(key) or not key.endswith("softcapping")):
            scales[name] = config.positive(key)
    return scales
