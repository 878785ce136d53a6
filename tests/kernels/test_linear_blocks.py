# SPDX-License-Identifier: Apache-2.0
"""How products are cut."""

import sys
from types import SimpleNamespace

import pytest
import torch

from lightllm_backend.kernels.linear import gated_linear, linear_blocks, linear_splits

CHOICES = [(12288, 4096, False), (64, 128, False), (576, 1536, False), (2048, 2048, False), (1024, 640, True)]


@pytest.mark.parametrize("product", [*CHOICES, (4096, 11008, False), (22016, 4096, True)])
@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0)])
@pytest.mark.parametrize("tokens", [1, 16, 17, 64])
def test_blocks_divide_the_weight(tokens, product, capability):
    blocks = linear_blocks.choose_blocks(tokens, *product, capability, 132)
    if blocks is not None:
        assert product[0] % blocks.out == 0
        assert product[1] % (blocks.inner * blocks.splits) == 0
        assert blocks.splits == 1 or not product[2]


def test_what_is_chosen():
    assert linear_blocks.choose_blocks(1, 2048, 2048, False, (9, 0), 132).splits == 4  # not stored: the rule
    assert linear_blocks.choose_blocks(1, 12288, 4096, False, (9, 0), 132).splits == 1
    assert linear_blocks.choose_blocks(1, 250880, 4096, False, (9, 0), 132) is not None, "other tokens are stored"
    assert linear_blocks.choose_blocks(65, 2048, 2048, False, (9, 0), 132) is None, "more tokens only as stored"
    assert linear_blocks.choose_blocks(65, 4096, 11008, False, (9, 0), 132).splits == 2
    assert linear_blocks.choose_blocks(257, 4096, 11008, False, (9, 0), 132) is None
    assert linear_blocks.choose_blocks(65, 4096, 11008, False, (8, 0), 108) is None
    assert linear_blocks.choose_blocks(1, 12288, 4096, False, (7, 0), 80) is None
    assert linear_blocks.choose_blocks(1, 1000, 1000, False, (9, 0), 132) is None


def test_what_copies_ahead_is_preferred():
    product = (22016, 4096, True, (9, 0), 132)
    assert linear_blocks.choose_blocks(33, *product, can_prefetch=True).programs_per_sm > 0
    assert linear_blocks.choose_blocks(33, *product).programs_per_sm == 0
    assert linear_blocks.choose_blocks(1, 250880, 4096, False, (9, 0), 132, can_prefetch=True).programs_per_sm == 0, (
        "unknown"
    )
    assert linear_blocks.choose_blocks(33, 22016, 4096, True, (10, 0), 148, can_prefetch=True).programs_per_sm == 0


def test_where_it_is(monkeypatch):
    """On a Hopper GPU, with a Triton-lang that was tried, of tensors that descriptors know."""
    monkeypatch.setattr(linear_blocks, "compute_capability", lambda device: (9, 0))
    monkeypatch.setattr(linear_blocks, "multiprocessor_count", lambda device: 132)
    x, weight = torch.empty(33, 4096, dtype=torch.float16), torch.empty(22016, 4096, dtype=torch.float16)
    for tried, described in ((True, True), (True, False), (False, True)):
        monkeypatch.setattr(linear_blocks, "GLUON_TRIED", tried)
        monkeypatch.setattr(linear_blocks, "has_descriptors", lambda *tensors, described=described: described)
        assert bool(linear_blocks.blocks_for(x, weight, is_gated=True).programs_per_sm) == (tried and described)
    assert linear_blocks.blocks_for(x.float(), weight.float(), is_gated=True) is None


@pytest.mark.parametrize("is_gated", [False, True])
def test_others_launch_it(is_gated, monkeypatch):
    launched = []
    module = SimpleNamespace(launch_prefetch=lambda *arguments, **keywords: launched.append((arguments, keywords)))
    monkeypatch.setitem(sys.modules, "lightllm_backend.kernels.linear.linear_prefetch", module)
    x, weight, blocks = torch.empty(8, 64), torch.empty(64, 64), linear_blocks.LinearBlocks(64, 64, 3, 4, 1, 2)
    launch = gated_linear.launch_gated if is_gated else linear_splits.launch
    out = torch.empty(8, 32) if is_gated else torch.empty(1, 8, 64)
    launch(x, weight, None, out, blocks)
    (((got_x, got_weight, bias, parts, chosen), keywords),) = launched
    assert (got_x is x, got_weight is weight, bias, chosen, keywords) == (
        True,
        True,
        None,
        blocks,
        {"is_gated": is_gated},
    )
    assert parts.shape == (1, 8, 32 if is_gated else 64)
    assert parts.data_ptr() == out.data_ptr()


@pytest.mark.parametrize("path", [linear_blocks.STORED, linear_blocks.STORED_PREFETCH])
def test_stored_blocks_divide_their_weights(path):
    tables = linear_blocks.stored_blocks(path)
    assert "9.0" in tables
    for table in tables.values():
        for name, by_tokens in table.items():
            out_features, in_features = (int(number) for number in name.removesuffix(", gated").split(" x "))
            assert name == linear_blocks.product_name(out_features, in_features, name.endswith("gated"))
            assert set(by_tokens) <= {str(block) for block in linear_blocks.FEW_TOKENS + linear_blocks.MORE_TOKENS}
            for tokens, stored in by_tokens.items():
                blocks = None if stored is None else linear_blocks.LinearBlocks(*stored)
                assert blocks is None or out_features % blocks.out == 0
                assert blocks is None or in_features % (blocks.inner * blocks.splits) == 0 or int(tokens) > 64
                assert blocks is None or blocks.splits == 1 or not name.endswith("gated")
                assert blocks is None or (blocks.programs_per_sm > 0) == (path == linear_blocks.STORED_PREFETCH)
