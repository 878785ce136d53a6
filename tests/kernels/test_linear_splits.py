# SPDX-License-Identifier: Apache-2.0
"""linear_splits: the parts add up to the reference's product, and how a product is cut."""

import pytest
import torch

from lightllm_backend.kernels import launchers, linear_splits, reference
from tests.kernels.kernel_harness import TOLERANCE, relative_error

DTYPE = torch.float16  # see test_linear


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("out_features", "in_features", "splits"), [(64, 1024, 8), (192, 512, 2), (1024, 128, 1)])
def test_parts_add_up(out_features, in_features, splits, with_bias, device):
    x, weight = (torch.randn(rows, in_features, device=device).to(DTYPE) for rows in (3, out_features))
    bias = torch.randn(out_features, device=device).to(DTYPE) if with_bias else None
    parts = launchers.linear_splits(x, weight, bias)
    assert parts.shape == (splits, 3, out_features)
    assert parts.dtype == (DTYPE if splits == 1 else torch.float32)
    expected = reference.linear(x.float(), weight.float(), None if bias is None else bias.float())
    assert relative_error(parts.float().sum(0), expected) < TOLERANCE[DTYPE]
    whole = reference.linear_splits(x.float(), weight.float(), None if bias is None else bias.float())
    assert relative_error(whole.sum(0), expected) < 1e-6


def test_what_is_left_to_cublas_is_one_part(device):
    x, weight = torch.randn(70, 64, device=device), torch.randn(48, 64, device=device)
    assert torch.equal(launchers.linear_splits(x, weight), reference.linear(x, weight).unsqueeze(0))


CHOICES = [(12288, 4096, False), (64, 128, False), (576, 1536, False), (2048, 2048, False), (1024, 640, True)]


@pytest.mark.parametrize("product", [*CHOICES, (4096, 11008, False), (22016, 4096, True)])
@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0)])
@pytest.mark.parametrize("tokens", [1, 16, 17, 64])
def test_blocks_divide_the_weight(tokens, product, capability):
    blocks = linear_splits.choose_blocks(tokens, *product, capability, 132)
    if blocks is not None:
        assert product[0] % blocks.out == 0
        assert product[1] % (blocks.inner * blocks.splits) == 0
        assert blocks.splits == 1 or not product[2]


def test_what_is_chosen():
    assert linear_splits.choose_blocks(1, 2048, 2048, False, (9, 0), 132).splits == 4  # not stored: the rule
    assert linear_splits.choose_blocks(1, 12288, 4096, False, (9, 0), 132).splits == 1
    assert linear_splits.choose_blocks(65, 12288, 4096, False, (9, 0), 132) is None
    assert linear_splits.choose_blocks(1, 12288, 4096, False, (7, 0), 80) is None
    assert linear_splits.choose_blocks(1, 1000, 1000, False, (9, 0), 132) is None


def test_stored_blocks_divide_their_weights():
    tables = linear_splits.stored_blocks()
    assert "9.0" in tables
    for table in tables.values():
        for name, by_tokens in table.items():
            out_features, in_features = (int(number) for number in name.removesuffix(", gated").split(" x "))
            assert name == linear_splits.product_name(out_features, in_features, name.endswith("gated"))
            assert set(by_tokens) == {str(block) for block in linear_splits.TOKEN_BLOCKS}
            for stored in by_tokens.values():
                blocks = None if stored is None else linear_splits.LinearBlocks(*stored)
                assert blocks is None or out_features % blocks.out == 0
                assert blocks is None or in_features % (blocks.inner * blocks.splits) == 0
                assert blocks is None or blocks.splits == 1 or not name.endswith("gated")
