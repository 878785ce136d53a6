# SPDX-License-Identifier: Apache-2.0
"""Which products with weights of 4 and 8 bits Hopper's kernel computes, and that what is stored for it fits."""

import importlib
import math
import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from lightllm_backend.kernels.linear.choice import stored_blocks
from lightllm_backend.kernels.linear.gated_linear import gated_linear
from lightllm_backend.kernels.linear.linear import linear
from lightllm_backend.kernels.linear.linear_splits import linear_splits
from lightllm_backend.kernels.quantized import choice, product
from lightllm_backend.kernels.quantized.choice import (
    BLOCKS,
    BYTES_OF_PROGRAM,
    MAX_16_BIT_ROUNDED,
    MAX_16_BIT_TOKENS,
    MAX_BLOCK_TOKENS,
    PAIRED_TOKENS,
    PREFETCH_TOKENS,
    SHARED_BYTES,
    PrefetchBlocks,
    blocks_by_rule,
    most_stages,
)
from lightllm_backend.kernels.quantized.rounded_tokens import PairedTokens, RoundedTokens
from lightllm_backend.kernels.quantized.weight import QuantizedWeight
from tests.kernels.quantized_weights import DTYPES

MULTIPROCESSORS = 132


def weight_of(kind: str, out_features: int, in_features: int, group_size: int | None = None) -> QuantizedWeight:
    """Without data, as weight_dtype makes it."""
    group_size = group_size or (math.gcd(128, in_features) if kind == "int4" else in_features)
    values = torch.empty(out_features, in_features // (8 if kind == "int4" else 1), dtype=DTYPES[kind])
    scales = torch.empty(in_features // group_size, out_features, dtype=torch.float16 if kind == "int4" else None)
    return QuantizedWeight(values, scales, group_size, quantizes_input=kind == "fp8", in_fragments=True)


def test_stored_blocks_fit_and_divide_their_products():
    for name, by_tokens in stored_blocks(BLOCKS)["9.0"].items():
        kind, out_features, in_features, gated = re.fullmatch(r"([\w ]+), (\d+) x (\d+)(, gated)?", name).groups()
        weight, rounds = weight_of(kind.partition(" ")[0], int(out_features), int(in_features)), kind == "fp8 by fp8"
        counts = PAIRED_TOKENS[kind.partition(" ")[0]] if kind.endswith(" by pairs") else PREFETCH_TOKENS
        assert set(map(int, by_tokens)) <= set(counts)
        for tokens, stored in by_tokens.items():
            if stored is not None:
                blocks = PrefetchBlocks(*stored)
                steps = int(in_features) // blocks.inner
                assert 2 * blocks.consumers <= blocks.stages
                assert blocks.stages <= most_stages(blocks, int(tokens), weight, bool(gated), rounds)
                assert blocks.stages % blocks.consumers == 0
                assert int(in_features) % blocks.inner == 0
                assert (blocks.splits - 1) * -(-steps // blocks.splits) + blocks.consumers <= steps
                assert blocks.splits == 1 or not gated
                assert choice.row_tiles_of(blocks) == 1 or (blocks.consumers == 1 and blocks.tokens <= MAX_BLOCK_TOKENS)
                assert blocks.fetched % 32 == 0


@pytest.mark.parametrize("tokens", PREFETCH_TOKENS)
@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize(
    ("kind", "out_features", "in_features", "group_size", "rounds"),
    [
        ("int4", 4096, 14336, 128, False),
        ("int4", 1152, 576, 64, False),
        ("int8", 5120, 5120, None, False),
        ("int8", 128, 128, None, False),
        ("fp8", 4096, 4096, 128, False),
        ("fp8", 4096, 4096, None, True),
        ("fp8", 1152, 576, None, True),
    ],
)
def test_the_rule_s_blocks_fit(kind, out_features, in_features, group_size, rounds, is_gated, tokens):
    weight = weight_of(kind, out_features, in_features, group_size)
    blocks = blocks_by_rule(tokens, weight, is_gated, MULTIPROCESSORS, rounds)
    assert 2 * blocks.consumers <= blocks.stages <= most_stages(blocks, tokens, weight, is_gated, rounds)
    assert in_features % blocks.inner == 0
    assert blocks.splits == 1 or not is_gated
    steps = in_features // blocks.inner
    assert (blocks.splits - 1) * -(-steps // blocks.splits) + blocks.consumers <= steps


def test_many_tokens_and_rows_in_fp8_are_left_to_cublas():
    assert blocks_by_rule(256, weight_of("fp8", 16384, 4096), False, MULTIPROCESSORS, rounds=True) is None
    assert blocks_by_rule(256, weight_of("fp8", 16384, 4096), True, MULTIPROCESSORS, rounds=True) is not None
    assert blocks_by_rule(256, weight_of("int8", 16384, 4096), False, MULTIPROCESSORS) is not None
    assert blocks_by_rule(128, weight_of("fp8", 16384, 4096), False, MULTIPROCESSORS, rounds=True) is not None


@pytest.fixture
def launched(monkeypatch):
    """What the launcher was called with, on a GPU that is a Hopper."""
    calls = []
    module = SimpleNamespace(launch_quantized_prefetch=lambda *arguments: calls.append(arguments))
    monkeypatch.setitem(sys.modules, "lightllm_backend.kernels.quantized.quantized_prefetch", module)
    monkeypatch.setattr(choice, "compute_capability", lambda _: (9, 0))
    monkeypatch.setattr(choice, "multiprocessor_count", lambda _: MULTIPROCESSORS)
    monkeypatch.setattr(choice, "has_descriptors", lambda *_: True)
    monkeypatch.setattr(
        product, "quantize_tokens", lambda x, weight: (x.to(weight.values.dtype), torch.ones(len(x), 1))
    )
    return calls


@pytest.mark.parametrize(("tokens", "padded"), [(1, "8"), (MAX_16_BIT_TOKENS, "64"), (MAX_16_BIT_TOKENS + 1, "128")])
@pytest.mark.parametrize("kind", ["int4", "fp8"])
def test_products_launch_it(kind, tokens, padded, launched):
    x = torch.empty(tokens, 4096, dtype=torch.bfloat16)
    is_rounded = kind == "fp8" and tokens > MAX_16_BIT_TOKENS
    stored = stored_blocks(BLOCKS)["9.0"][f"{kind}{' by fp8' if is_rounded else ''}, 4096 x 4096"]
    parts = linear_splits(x, weight_of(kind, 4096, 4096))
    [(values, scales, _, bias, out, blocks, is_gated, _, is_paired)] = launched
    assert blocks == PrefetchBlocks(*stored[padded])
    assert out is parts
    assert parts.shape == (blocks.splits, tokens, 4096)
    assert parts.dtype == torch.bfloat16
    assert values.dtype == (torch.float8_e4m3fn if is_rounded else torch.bfloat16)
    assert (scales is not None) == is_rounded
    assert bias is None
    assert not is_gated
    assert not is_paired


def test_products_take_what_a_norm_has_rounded(launched):
    weight = weight_of("fp8", 4096, 4096)
    x = RoundedTokens(torch.empty(65, 4096, dtype=weight.values.dtype), torch.empty(65, 1), torch.bfloat16)
    parts = linear_splits(x, weight)
    assert parts.shape[1:] == (65, 4096)
    assert launched[0][:2] == (x.values, x.scales)


def test_parts_of_16_bits_are_rearranged_in_shared_memory():
    blocks, free = PrefetchBlocks(128, 128, 2, 4, 1, 2, 1), SHARED_BYTES - BYTES_OF_PROGRAM
    assert free // (128 * (128 + 2 * 64)) == 7
    assert most_stages(blocks, 64, weight_of("fp8", 4096, 4096)) == (free - 2 * 128 * 64) // (128 * (128 + 2 * 64)) == 6


def test_what_a_norm_should_round():
    weight, dtype = weight_of("fp8", 64, 128), torch.bfloat16
    assert choice.takes_rounded(weight, MAX_16_BIT_ROUNDED + 1, dtype)
    assert not choice.takes_rounded(weight, MAX_16_BIT_ROUNDED, dtype)
    assert not choice.takes_rounded(weight, MAX_16_BIT_ROUNDED + 1, torch.float32)
    for other in (None, weight.values, weight_of("int8", 64, 128), replace(weight, in_fragments=False)):
        assert not choice.takes_rounded(other, MAX_16_BIT_ROUNDED + 1, dtype)


@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
@pytest.mark.parametrize(("dtype", "of_parts"), [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)])
def test_parts_have_16_bits_if_none_overflows(kind, dtype, of_parts, launched):
    parts = linear_splits(torch.empty(40, 4096, dtype=dtype), weight_of(kind, 4096, 4096))
    assert len(parts) > 1
    assert parts.dtype == of_parts


@pytest.mark.parametrize(
    ("kind", "tokens", "padded"), [("int4", 1, "4"), ("int4", 5, "8"), ("int4", 16, "16"), ("fp8", 3, "4")]
)
def test_products_take_the_pairs_that_a_norm_has_made(kind, tokens, padded, launched):
    weight, table = weight_of(kind, 12288, 4096), stored_blocks(BLOCKS)["9.0"]
    values = torch.empty(2 * tokens, 4096, dtype=choice.pair_dtype(weight))
    x = PairedTokens(values, torch.empty(tokens), torch.bfloat16)
    parts = linear_splits(x, weight)
    assert parts.shape[1:] == (tokens, 12288)
    assert gated_linear(x, weight_of(kind, 22016, 4096)).shape == (tokens, 11008)
    for call, name in zip(launched, ("12288 x 4096", "22016 x 4096, gated"), strict=True):
        assert call[:2] == (x.values, x.scales)
        assert call[5] == PrefetchBlocks(*table[f"{kind} by pairs, {name}"][padded])
        assert call[-1]


@pytest.mark.parametrize("kind", ["int4", "fp8"])
def test_what_a_norm_should_make_pairs_of(kind, launched):
    weight, dtype = weight_of(kind, 12288, 4096), torch.bfloat16
    most = PAIRED_TOKENS[kind][-1]
    assert choice.takes_paired(weight, most, dtype)
    assert choice.takes_paired(replace(weight, quantizes_input=not weight.quantizes_input), 1, dtype)
    assert not choice.takes_paired(weight, most + 1, dtype)
    assert not choice.takes_paired(weight, 0, dtype)
    assert not choice.takes_paired(weight, 1, torch.float32)
    assert choice.takes_paired(weight_of(kind, 22016, 4096), 1, dtype)
    others = [None, weight.values, weight_of("int8", 12288, 4096), weight_of("fp8", 12288, 4096, 128)]
    others += [weight_of(kind, 12320, 4096)]  # no blocks are stored for it
    others += [replace(weight, in_fragments=False), replace(weight, zeros=torch.empty(1, 12288, dtype=torch.int8))]
    others += [replace(weight, order=torch.arange(4096, dtype=torch.int32))]
    for other in others:
        assert not choice.takes_paired(other, 1, dtype)
    assert not launched


@pytest.mark.parametrize("is_gelu", [False, True])
def test_gated_products_launch_it(is_gelu, launched):
    x, weight = torch.empty(3, 4096, dtype=torch.bfloat16), weight_of("int4", 22016, 4096)
    gated = gated_linear(x, weight, is_gelu=is_gelu)
    assert gated.shape == (3, 11008)
    assert launched[0][-3:] == (True, is_gelu, False)


def test_gelu_is_part_of_a_product_in_one_split(launched, monkeypatch):
    x, weight = torch.empty(3, 4096, dtype=torch.bfloat16), weight_of("int8", 16384, 4096)
    assert choice.prefetch_blocks(x, weight, False).splits == 1
    assert linear(x, weight, is_gelu=True).shape == (3, 16384)
    assert launched[0][-3:] == (False, True, False)
    other = weight_of("int8", 4096, 4096)
    assert choice.prefetch_blocks(x, other, False).splits > 1
    module = importlib.import_module("lightllm_backend.kernels.linear.linear")
    monkeypatch.setattr(module, "sum_splits", lambda parts, out: out)
    monkeypatch.setattr(module, "gelu_tanh", lambda product: ("gelu of", product.shape))
    assert linear(x, other, is_gelu=True) == ("gelu of", (3, 4096))
    assert launched[1][-3:] == (False, False, False)


@pytest.mark.parametrize(
    ("change", "dtype"),
    [({"in_fragments": False}, torch.bfloat16), ({}, torch.float32)],
    ids=["not in fragments", "float32"],
)
def test_others_do_not_launch_it(change, dtype, launched):
    weight = replace(weight_of("int8", 64, 128), **change)
    assert choice.prefetch_blocks(torch.empty(2, 128, dtype=dtype), weight, is_gated=False) is None
    assert choice.prefetch_blocks(torch.empty(300, 128, dtype=torch.bfloat16), weight, is_gated=False) is None
    odd = weight_of("int8", 72, 128)
    assert choice.prefetch_blocks(torch.empty(2, 128, dtype=torch.bfloat16), odd, is_gated=False) is None
    rounded = replace(weight_of("int8", 64, 128), quantizes_input=True)  # multiplied in 8 bits by scaled_linear
    assert choice.prefetch_blocks(torch.empty(65, 128, dtype=torch.bfloat16), rounded, is_gated=False) is None
    assert choice.prefetch_blocks(torch.empty(64, 128, dtype=torch.bfloat16), rounded, is_gated=False) is not None
    assert not launched


@pytest.mark.parametrize("tokens", PREFETCH_TOKENS)
def test_stored_blocks_leave_room_for_the_scales_of_small_groups(tokens, launched):
    weight = weight_of("int4", 22016, 4096, group_size=64)
    weight = replace(weight, zeros=torch.empty(weight.scales.shape, dtype=torch.int8))
    blocks = choice.prefetch_blocks(torch.empty(tokens, 4096, dtype=torch.bfloat16), weight, is_gated=True)
    assert 2 <= blocks.stages <= most_stages(blocks, tokens, weight)
    assert not launched
