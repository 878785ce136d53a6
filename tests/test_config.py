# SPDX-License-Identifier: Apache-2.0
"""EngineConfig: defaults, where settings come from, and what is refused."""

from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest

from lightllm_backend.config import ConfigError, EngineConfig

WEIGHTS = "NAME=WEIGHT, separated by commas; each name once, weights > 0"


def test_the_documented_defaults() -> None:
    config = EngineConfig.build({}, {})
    assert config == EngineConfig()
    assert (config.tp, config.mem_fraction, config.running_max_req_size) == (1, 0.9, 1000)
    assert config.max_req_input_len is config.max_req_total_len is None
    assert config.max_prompt_bytes == 1 << 20
    assert (config.host, config.http_port, config.grpc_port, config.metrics_port) == ("127.0.0.1", 8000, 8001, 8002)
    assert config.model_dir is config.max_total_token_num is config.eos_id is None
    assert config.trust_remote_code is False


def test_every_setting_says_what_it_is() -> None:
    assert [setting.name for setting in fields(EngineConfig) if not setting.metadata["help"]] == []


def test_it_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        EngineConfig().tp = 2  # type: ignore[misc]


def test_the_environment_wins_over_config_pbtxt() -> None:
    config = EngineConfig.build({"max_queue_size": "5", "dtype": "float16"}, {"LIGHTLLM_MAX_QUEUE_SIZE": "6"})
    assert (config.max_queue_size, config.dtype) == (6, "float16")


def test_an_empty_value_is_not_given() -> None:
    assert EngineConfig.build({"model_dir": "/a"}, {"LIGHTLLM_MODEL_DIR": ""}).model_dir is None


def test_torchrun_s_variables_name_host_0() -> None:
    torchrun = {"MASTER_ADDR": "a", "MASTER_PORT": "7", "LIGHTLLM_MASTER_PORT": "8"}
    config = EngineConfig.build({"master_addr": "b", "nnodes": "2", "tp": "4", "node_rank": "1"}, torchrun)
    assert (config.master_addr, config.master_port) == ("a", 8)
    assert config.host_ranks == range(2, 4)
    assert EngineConfig.build({}, config.environment()) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nnodes": 2, "tp": 3}, "tp is 3; allowed: a multiple of nnodes, which is 2"),
        ({"node_rank": 1}, "node_rank is 1; allowed: less than nnodes, which is 1"),
        ({"nnodes": 2, "tp": 2}, "master_addr is not set; allowed: the address of host 0, since nnodes is 2"),
    ],
)
def test_hosts_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}$"):
        EngineConfig(**settings)


def test_the_server_runs_on_host_0() -> None:
    hosts = [EngineConfig(nnodes=2, tp=2, master_addr="a", node_rank=number) for number in (0, 1)]
    hosts[0].check_host(serves=True)
    hosts[1].check_host(serves=False)
    with pytest.raises(ConfigError, match=r"^node_rank is 1; allowed: 0 for the server; the other hosts run python -m"):
        hosts[1].check_host(serves=True)


@pytest.mark.parametrize("variable", ["PATH", "LIGHTLLM_CACHE", "LIGHTLLM_RUN_DIR", "LIGHTLLM_TRITONSERVER"])
def test_variables_that_are_no_settings_are_left_alone(variable: str) -> None:
    assert EngineConfig.build({}, {variable: "anything"}) == EngineConfig()


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("tp", "4", 4),
        ("mem_fraction", "1", 1.0),
        ("mem_fraction", "0.05", 0.05),
        ("trust_remote_code", "True", True),
        ("trust_remote_code", " 0 ", False),
        ("eos_id", "2", (2,)),
        ("eos_id", "2, 0,7", (2, 0, 7)),
        ("open_apis", "trace", ("trace",)),
        ("open_apis", "trace, shared-memory", ("trace", "shared-memory")),
        ("queue_timeout_s", "1.5", 1.5),
        ("log_stats_interval", "0", 0.0),
        ("http_port", "65535", 65535),
        ("max_total_token_num", "1", 1),
        ("prefix_cache", "False", False),
        ("prefix_cache", "1", True),
        ("prefix_cache", "Tenant", "tenant"),
        ("tenant_weights", "gold=3, a=b=0.5,=2", (("gold", 3.0), ("a=b", 0.5), ("", 2.0))),
        ("tenant_reserve", "0", 0.0),
    ],
)
def test_texts_become_values(key: str, text: str, value: Any) -> None:
    parsed = getattr(EngineConfig.build({key: text}, {}), key)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("key", "text", "allowed"),
    [
        ("tp", "0", "a whole number ≥ 1"),
        ("tp", "two", "a whole number ≥ 1"),
        ("max_total_token_num", "0", "a whole number ≥ 1"),
        ("max_total_token_num", "1.5", "a whole number ≥ 1"),
        ("max_req_total_len", "1", "a whole number ≥ 2"),
        ("mem_fraction", "0", "0 < mem_fraction ≤ 1"),
        ("mem_fraction", "1.01", "0 < mem_fraction ≤ 1"),
        ("mem_fraction", "nan", "0 < mem_fraction ≤ 1"),
        ("prefix_cache", "tenants", "true | false | tenant"),
        ("tenant_weights", "gold", WEIGHTS),
        ("tenant_weights", "gold=0", WEIGHTS),
        ("tenant_weights", "gold=inf", WEIGHTS),
        ("tenant_weights", "gold=much", WEIGHTS),
        ("tenant_weights", "a=1,a=2", WEIGHTS),
        ("tenant_reserve", "1", "0 ≤ tenant_reserve < 1"),
        ("queue_timeout_s", "inf", "seconds > 0"),
        ("queue_timeout_s", "0", "seconds > 0"),
        ("log_stats_interval", "-1", "seconds ≥ 0"),
        ("load_format", "pickle", "auto | dummy"),
        ("dtype", "int4", "auto | bfloat16 | float16 | float32"),
        ("device", "tpu", "auto | cuda | cpu"),
        ("tokenizer_mode", "fast", "auto | slow"),
        ("kv_dtype", "fp4", "auto | int8"),
        ("eos_id", "-1", "ids ≥ 0, separated by commas"),
        ("eos_id", "2;3", "ids ≥ 0, separated by commas"),
        ("open_apis", "inference", "some of logging, model-repository, shared-memory, trace, separated by commas"),
        ("trust_remote_code", "maybe", "true | false"),
        ("grpc_port", "0", "a port, 1 … 65535"),
        ("grpc_port", "65536", "a port, 1 … 65535"),
    ],
)
def test_a_refusal_names_key_value_and_what_is_allowed(key: str, text: str, allowed: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        EngineConfig.build({}, {f"LIGHTLLM_{key.upper()}": text})
    message = str(refusal.value)
    assert message.startswith(f"{key} is ")
    assert text in message.replace("(", "").replace(",)", "")
    assert message.endswith(f"; allowed: {allowed}")


@pytest.mark.parametrize(
    ("parameters", "environment", "message"),
    [
        ({"max_tokens": "1"}, {}, "max_tokens in config.pbtxt is not a setting; allowed: model_dir, tp, "),
        ({}, {"LIGHTLLM_TYPO": "1"}, "LIGHTLLM_TYPO in the environment is not a setting; allowed: model_dir, tp, "),
    ],
)
def test_an_unknown_key_is_an_error_that_lists_the_known(
    parameters: dict[str, str], environment: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig.build(parameters, environment)


def test_a_constructor_is_checked_as_well() -> None:
    with pytest.raises(ConfigError, match="tp is 0"):
        EngineConfig(tp=0)


def test_the_environment_of_a_config_builds_the_same_config() -> None:
    config = EngineConfig(
        model_dir="/m", eos_id=(1, 2), mem_fraction=0.5, trust_remote_code=True, queue_timeout_s=2.5, http_port=9
    )
    assert EngineConfig.build({}, config.environment()) == config
    tenants = EngineConfig(prefix_cache="tenant", tenant_weights=(("gold", 3.0), ("a=b", 0.1)), tenant_reserve=0.1)
    assert EngineConfig.build({}, tenants.environment()) == tenants
    assert EngineConfig().environment() == {}
