# SPDX-License-Identifier: Apache-2.0
"""EngineConfig: every setting, its default and its allowed values. Standard library only.

A setting comes from the command line, else from the environment (`LIGHTLLM_<NAME>`), else from the `parameters` of the
generation model's config.pbtxt, else from its default. The launch command passes its settings on through the
environment, so this file reads two sources. The config is immutable and holds no measured values (the pool's size).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

ENVIRONMENT_PREFIX = "LIGHTLLM_"
PROBE_KEY_VARIABLE = "LIGHTLLM_PROBE_KEY"  # the secret that marks the launch command's probes
TORCHRUN_VARIABLES = ("MASTER_ADDR", "MASTER_PORT")  # as torchrun and its operators set them; ours have precedence
API_KEY_VARIABLE = "LIGHTLLM_API_KEY"  # API keys of the front; no setting, since every user can read command lines

TOKENIZER_MODES = ("auto", "slow")
LOG_FORMATS = ("text", "json")
# The APIs of Triton server that change or read what belongs to all clients, as its options spell them.
ADMINISTRATION_APIS = ("logging", "model-repository", "shared-memory", "trace")

# Environment variables with the prefix that are not settings: paths, a debug mode, and versions for build.sh.
_OTHER_VARIABLES = {
    "API_KEY",
    "CACHE",
    "IMAGE",
    "LAUNCHER",
    "ORIGINAL_LD_LIBRARY_PATH",
    "POISON_FREED_SLOTS",
    "PROBE_KEY",
    "RUN_DIR",
    "TORCH",
    "TRITONSERVER",
    "VENV",
}


class ConfigError(ValueError):
    """An unknown setting or a wrong value; the message names the key, the value and the allowed values."""


def _setting(default: Any, help: str, allowed: str = "", holds: Callable[[Any], bool] = lambda value: True) -> Any:
    """Make a field with its help and its check; the launch command's options and the documentation's table use them."""
    return field(default=default, metadata={"help": help, "allowed": allowed, "holds": holds})


def _choice(default: str, help: str, *choices: str) -> Any:
    return _setting(default, help, " | ".join(choices), lambda value: value in choices)


def _count(default: int | None, help: str, least: int = 1) -> Any:
    return _setting(default, help, f"a whole number ≥ {least}", lambda value: value >= least)


def _port(default: int | None, help: str) -> Any:
    return _setting(default, help, "a port, 1 … 65535", lambda value: 1 <= value <= 65535)


@dataclass(frozen=True)
class EngineConfig:
    """All settings. The server determines a default of `None` at start, as the help says."""

    model_dir: str | None = _setting(None, "Hugging Face directory of the model (default: the embedded SmolLM2)")
    tp: int = _count(1, "tensor-parallel ranks, one process and GPU each, on all hosts together")
    nnodes: int = _count(1, "hosts that compute the model together, with tp / nnodes ranks each")
    node_rank: int = _count(0, "this host's number among them; the server runs on host 0", 0)
    master_addr: str | None = _setting(
        None, "address of host 0 at which the other hosts join it; also: MASTER_ADDR (with several hosts only)"
    )
    master_port: int = _port(29500, "port of host 0 at which the other hosts join it; also: MASTER_PORT")
    max_total_token_num: int | None = _count(
        None,
        "tokens that the KV pool holds in all layers; each rank has its share (default: what fits in mem_fraction)",
    )
    mem_fraction: float = _setting(
        0.9,
        "share of each rank's GPU memory for weights, workspace and KV pool",
        "0 < mem_fraction ≤ 1",
        lambda v: 0 < v <= 1,
    )
    load_format: str = _choice("auto", "dummy: random weights, from config.json alone, for benchmarks", "auto", "dummy")
    max_prompt_bytes: int = _count(1 << 20, "maximum size of a prompt text, in bytes")
    batch_max_tokens: int | None = _count(
        None, "maximum new prompt tokens per step (default: 8192 on a GPU, 512 on a CPU)"
    )
    running_max_req_size: int = _count(1000, "maximum running requests")
    max_req_input_len: int | None = _count(
        None, "maximum prompt tokens per request (default: max_req_total_len minus one)"
    )
    max_req_total_len: int | None = _count(
        None, "maximum prompt and generated tokens per request (default: the model's limit or the KV pool's size)", 2
    )
    admission: str = _choice(
        "exact",
        "exact: admit if all max_tokens fit; past_future: predict lengths from recent answers, may preempt",
        "exact",
        "past_future",
    )
    prefix_cache: bool | str = _setting(
        True,
        "reuse K and V of earlier requests with the same prefix; tenant: only of the same tenant's; false: layers with"
        " a sliding window keep K and V of the window alone",
        "true | false | tenant",
        lambda v: v in (True, False, "tenant"),
    )
    max_queue_size: int = _count(10000, "maximum waiting requests; the server refuses more with UNAVAILABLE")
    queue_timeout_s: float | None = _setting(
        None, "maximum wait in the queue, in seconds (default: no limit)", "seconds > 0", lambda v: 0 < v < math.inf
    )
    tenant_weights: tuple[tuple[str, float], ...] | None = _setting(
        None,
        "shares of tenants in the engine, NAME=WEIGHT, comma-separated (default: each tenant has weight 1)",
        "NAME=WEIGHT, separated by commas; each name once, weights > 0",
    )
    tenant_reserve: float = _setting(
        0.0,
        "share of the KV pool and of running_max_req_size that is kept for tenants that have no request running",
        "0 ≤ tenant_reserve < 1",
        lambda v: 0 <= v < 1,
    )
    tokenizer_mode: str = _choice("auto", "slow: use sentencepiece itself", *TOKENIZER_MODES)
    dtype: str = _choice(
        "auto",
        "data type of weights and activations (default: the model's; on a CPU the fastest)",
        "auto",
        "bfloat16",
        "float16",
        "float32",
    )
    weight_dtype: str = _choice(
        "auto",
        "data type of the linear layers' weights (auto: the checkpoint's; others quantise its weights while they load)",
        "auto",
        "fp8",
        "int8",
        "int4",
    )
    head_dtype: str = _choice(
        "auto", "data type of the head's weight (auto: the checkpoint's; others quantise it)", "auto", "fp8", "int8"
    )
    kv_dtype: str = _choice(
        "auto", "data type of the KV pool (auto: same as dtype; int8: nearly twice the tokens)", "auto", "int8"
    )
    eos_id: tuple[int, ...] | None = _setting(
        None,
        "end-of-sequence ids, comma-separated (default: the model's)",
        "ids ≥ 0, separated by commas",
        lambda v: len(v) > 0 and min(v) >= 0,
    )
    trust_remote_code: bool = _setting(False, "let the tokenizer run code from model_dir", "true | false")
    device: str = _choice("auto", "auto: a GPU if there is one", "auto", "cuda", "cpu")
    log_stats_interval: float = _setting(
        10.0, "interval of statistics lines in the log, in seconds; 0: none", "seconds ≥ 0", lambda v: 0 <= v < math.inf
    )
    log_format: str = _choice("text", "form of the lines in the log of all processes of ours", *LOG_FORMATS)
    log_requests: str = _choice(
        "none",
        "requests whose end is a line in the log: none; failed: those that failed or were rejected; all",
        "none",
        "failed",
        "all",
    )
    log_prompts: bool = _setting(False, "let the lines of log_requests have the requests' prompts", "true | false")
    trace_url: str | None = _setting(
        None,
        "OpenTelemetry collector that gets spans, as OTLP over HTTP, such as http://127.0.0.1:4318/v1/traces"
        " (default: no spans)",
        "a URL that begins with http:// or https://",
        lambda v: re.fullmatch(r"https?://[^/\s]+\S*", v) is not None,
    )
    trace_rate: int = _count(
        0,
        "every so many requests one is traced; 0: only those whose client sends a traceparent, which always are"
        " (launch command only)",
        0,
    )
    worker_python: str | None = _setting(None, "interpreter of the workers (default: python3 on PATH)")
    unread_timeout_s: float = _setting(
        60.0,
        "seconds after which HTTP clients that read nothing are disconnected (launch command only)",
        "0 < unread_timeout_s ≤ 86400",
        lambda v: 0 < v <= 86400,
    )
    open_apis: tuple[str, ...] | None = _setting(
        None,
        "administration APIs of Triton server that every client may call; model-repository also lets them load and"
        " unload models (default: none; launch command only)",
        f"some of {', '.join(ADMINISTRATION_APIS)}, separated by commas",
        lambda v: set(v) <= set(ADMINISTRATION_APIS),
    )
    host: str = _setting("127.0.0.1", "listening address of the server (launch command only)")
    http_port: int = _port(8000, "HTTP port (launch command only)")
    grpc_port: int = _port(8001, "gRPC port (launch command only)")
    metrics_port: int = _port(8002, "metrics port (launch command only)")
    openai_port: int | None = _port(
        None, "port of the front: OpenAI's API, LightLLM's and the page (default: no front)"
    )
    front_processes: int = _count(1, "processes of the front, which share its port")
    served_model_name: str | None = _setting(
        None,
        "name of the model in OpenAI's API (default: the name of its directory)",
        "a name that is not empty",
        lambda v: v.strip() != "",
    )
    api_key_file: str | None = _setting(
        None, f"file with the front's API keys, one a line; also: {API_KEY_VARIABLE} (default: none is asked for)"
    )
    cors_origins: tuple[str, ...] | None = _setting(
        None,
        "origins whose pages may call the front, comma-separated (default: the front's own)",
        "* or origins like https://example.com, separated by commas",
        lambda v: all(re.fullmatch(r"\*|https?://[^/\s]+", origin) for origin in v),
    )
    generation_config: str = _choice(
        "auto",
        "auto: temperature, top_p, top_k, min_p and repetition_penalty of the front's requests have their defaults from"
        " the model's generation_config.json",
        "auto",
        "none",
    )
    tool_call_parser: str = _choice(
        "auto",
        "form of the tool calls in the model's text (auto: by its chat template)",
        "auto",
        "hermes",
        "llama3",
        "none",
    )
    reasoning_parser: str = _choice(
        "auto", "form of the reasoning in the model's text (auto: by its chat template)", "auto", "think", "none"
    )
    max_body_bytes: int = _count(8 << 20, "maximum size of a request to the front, in bytes")
    restart: int = _count(3, "starts of a new server after failures in a row (launch command only)", 0)
    shutdown_timeout_s: float = _setting(
        30.0,
        "time that running requests have to end when the server is stopped, in seconds (launch command only)",
        "seconds ≥ 0",
        lambda v: 0 <= v < math.inf,
    )

    def __post_init__(self) -> None:
        for setting in fields(self):
            value = getattr(self, setting.name)
            if value is not None and not setting.metadata["holds"](value):
                raise _refusal(setting.name, value, setting.metadata["allowed"])
        if self.tp % self.nnodes:
            raise ConfigError(f"tp is {self.tp}; allowed: a multiple of nnodes, which is {self.nnodes}")
        if self.node_rank >= self.nnodes:
            raise ConfigError(f"node_rank is {self.node_rank}; allowed: less than nnodes, which is {self.nnodes}")
        if self.nnodes > 1 and self.master_addr is None:
            raise ConfigError(f"master_addr is not set; allowed: the address of host 0, since nnodes is {self.nnodes}")

    @classmethod
    def build(cls, parameters: Mapping[str, str], environment: Mapping[str, str]) -> EngineConfig:
        """Read config.pbtxt's `parameters`, overridden by the environment. An empty value counts as absent."""
        values: dict[str, str] = {}
        for key, value in parameters.items():
            if key not in cls.__dataclass_fields__:
                raise _unknown(key, "config.pbtxt")
            values[key] = value
        values |= {name.lower(): environment[name] for name in TORCHRUN_VARIABLES if environment.get(name)}
        for variable, value in environment.items():
            key = variable.removeprefix(ENVIRONMENT_PREFIX)
            if key == variable or key in _OTHER_VARIABLES:
                continue
            if key.lower() not in cls.__dataclass_fields__:
                raise _unknown(variable, "the environment")
            values[key.lower()] = value
        return cls(**{key: _parse(key, value) for key, value in values.items() if value != ""})

    @property
    def host_ranks(self) -> range:
        """The ranks on this host."""
        per_host = self.tp // self.nnodes
        return range(self.node_rank * per_host, (self.node_rank + 1) * per_host)

    def check_host(self, serves: bool) -> None:
        """Raise ConfigError unless this host is host 0, if it serves, or another one, if it does not."""
        if serves and self.node_rank > 0:
            raise ConfigError(
                f"node_rank is {self.node_rank}; allowed: 0 for the server; the other hosts run"
                " python -m lightllm_backend.worker"
            )
        if not serves and self.node_rank == 0:
            raise ConfigError(
                f"node_rank is 0; allowed: 1 … {self.nnodes - 1}; host 0 runs the server"
                if self.nnodes > 1
                else "nnodes is 1; allowed: at least 2; one host alone runs the server"
            )

    def local_address(self, port: int) -> str:
        """Return the address of a port for a client on this machine, also if the server listens on all interfaces."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def environment(self) -> dict[str, str]:
        """Return the settings that differ from the defaults, as environment variables for `build`."""
        variables = {}
        for setting in fields(self):
            value = getattr(self, setting.name)
            if value != setting.default:
                items = value if isinstance(value, tuple) else [value]
                texts = ["=".join(map(str, item)) if isinstance(item, tuple) else str(item) for item in items]
                variables[ENVIRONMENT_PREFIX + setting.name.upper()] = ",".join(texts)
        return variables


def _parse(key: str, text: str) -> Any:
    setting = EngineConfig.__dataclass_fields__[key]
    kind = str(setting.type).removesuffix(" | None")
    try:
        if kind in ("bool", "bool | str"):
            word = text.strip().lower()
            booleans = {"true": True, "1": True, "false": False, "0": False}
            return booleans[word] if kind == "bool" else booleans.get(word, word)
        if kind == "tuple[int, ...]":
            return tuple(int(item) for item in text.split(","))
        if kind == "tuple[str, ...]":
            return tuple(item.strip() for item in text.split(","))
        if kind == "tuple[tuple[str, float], ...]":
            return _weights(text)
        return {"int": int, "float": float, "str": str}[kind](text)
    except (ValueError, KeyError):
        raise _refusal(key, text, setting.metadata["allowed"]) from None


def _weights(text: str) -> tuple[tuple[str, float], ...]:
    """Parse NAME=WEIGHT,…; raise ValueError for a weight that is none, and for a name that comes twice."""
    pairs = [item.rpartition("=") for item in text.split(",")]
    weights = {name.strip(): float(weight) for name, _, weight in pairs}
    if len(weights) < len(pairs) or not all(sign for _, sign, _ in pairs):
        raise ValueError
    if not all(0 < weight < math.inf for weight in weights.values()):
        raise ValueError
    return tuple(weights.items())


def _refusal(key: str, value: Any, allowed: str) -> ConfigError:
    shown = ",".join(map(str, value)) if isinstance(value, tuple) else repr(value)
    return ConfigError(f"{key} is {shown}; allowed: {allowed}")


def _unknown(key: str, source: str) -> ConfigError:
    return ConfigError(f"{key} in {source} is not a setting; allowed: {', '.join(EngineConfig.__dataclass_fields__)}")
