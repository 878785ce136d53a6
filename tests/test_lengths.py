# SPDX-License-Identifier: Apache-2.0
"""How long requests may be: the model's limit, the settings and the KV pool, and which of them a message names."""

import pytest

from lightllm_backend.config import EngineConfig
from lightllm_backend.lengths import LengthLimits
from lightllm_backend.options import check_lengths
from lightllm_backend.request import RequestError


@pytest.mark.parametrize(
    ("settings", "model", "pool", "expected"),
    [
        ({}, 131072, None, (131071, "the model's limit", 131072, "the model's limit")),
        ({}, 131072, 900000, (131071, "the model's limit", 131072, "the model's limit")),
        ({}, 131072, 131071, (131071, "the model's limit", 131072, "the model's limit")),  # n tokens need n - 1 slots
        ({}, 131072, 131070, (131070, "the KV pool of 131070 tokens", 131071, "the KV pool of 131070 tokens")),
        ({}, 8192, 1, (1, "the KV pool of 1 tokens", 2, "the KV pool of 1 tokens")),
        ({"max_req_total_len": 3072}, 8192, 9000, (3071, "max_req_total_len", 3072, "max_req_total_len")),
        ({"max_req_total_len": 8192}, 8192, 9000, (8191, "max_req_total_len", 8192, "max_req_total_len")),
        ({"max_req_total_len": 9000}, 8192, 9000, (8191, "the model's limit", 8192, "the model's limit")),
        ({"max_req_total_len": 9000}, 10000, 99, (99, "the KV pool of 99 tokens", 100, "the KV pool of 99 tokens")),
        ({"max_req_input_len": 2048}, 8192, 9000, (2048, "max_req_input_len", 8192, "the model's limit")),
        ({"max_req_input_len": 8192}, 8192, 9000, (8191, "the model's limit", 8192, "the model's limit")),
        (
            {"max_req_input_len": 2048, "max_req_total_len": 3072}, 131072, 10**6,
            (2048, "max_req_input_len", 3072, "max_req_total_len"),
        ),
    ],
)  # fmt: skip
def test_the_least_limit_counts_and_is_named(settings, model, pool, expected) -> None:
    limits = LengthLimits.of(EngineConfig(**settings), model, pool)
    assert (limits.max_input, limits.max_input_source, limits.max_total, limits.max_total_source) == expected


@pytest.mark.parametrize(
    ("settings", "model", "pool", "expected"),
    [
        ({}, 100, 50, []),
        ({"max_req_total_len": 100, "max_req_input_len": 99}, 100, 99, []),
        (
            {"max_req_total_len": 101, "max_req_input_len": 100}, 100, 500,
            [
                "max_req_total_len is 101; 100 is used, by the model's limit",
                "max_req_input_len is 100; 99 is used, by the model's limit",
            ],
        ),
        ({"max_req_total_len": 90}, 100, 50, ["max_req_total_len is 90; 51 is used, by the KV pool of 50 tokens"]),
        (
            {"max_req_total_len": 90, "max_req_input_len": 95}, 100, 500,
            ["max_req_input_len is 95; 89 is used, by max_req_total_len"],
        ),
    ],
)  # fmt: skip
def test_a_setting_above_the_limit_is_told_of(settings, model, pool, expected) -> None:
    config = EngineConfig(**settings)
    assert list(LengthLimits.of(config, model, pool).warnings(config)) == expected


@pytest.mark.parametrize(
    ("settings", "model", "pool", "num_input", "max_tokens", "said"),
    [
        ({}, 64, 999, 64, 1, "at most 63 prompt tokens (the model's limit)"),
        ({}, 64, 999, 60, 5, "at most 64 in all (the model's limit)"),
        ({}, 64, 40, 41, 1, "at most 40 prompt tokens (the KV pool of 40 tokens)"),
        ({}, 64, 40, 40, 2, "at most 41 in all (the KV pool of 40 tokens)"),
        ({"max_req_total_len": 30}, 64, 40, 1, 30, "at most 30 in all (max_req_total_len)"),
        ({"max_req_total_len": 30}, 64, 40, 30, 1, "at most 29 prompt tokens (max_req_total_len)"),
        ({"max_req_input_len": 9}, 64, 40, 10, 1, "at most 9 prompt tokens (max_req_input_len)"),
        ({"max_req_input_len": 9}, 64, 40, 9, 33, "at most 41 in all (the KV pool of 40 tokens)"),
    ],
)
def test_a_refusal_names_the_numbers_and_what_sets_the_limit(settings, model, pool, num_input, max_tokens, said):
    limits = LengthLimits.of(EngineConfig(**settings), model, pool)
    with pytest.raises(RequestError) as refusal:
        check_lengths(num_input, max_tokens, limits)
    assert refusal.value.code == "INVALID_ARG"
    asked = f"the prompt has {num_input} tokens and max_tokens is {max_tokens}"
    assert refusal.value.message == f"{asked}; allowed: {said}"


def test_what_is_said_at_start() -> None:
    limits = LengthLimits.of(EngineConfig(max_req_input_len=2048), 131072, 900000)
    assert str(limits) == "at most 2,048 prompt tokens (max_req_input_len), 131,072 in all (the model's limit)"
