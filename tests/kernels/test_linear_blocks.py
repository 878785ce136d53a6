# SPDX-License-Identifier: Apache-2.0
"""How products are cut."""

import pytest

from lightllm_backend.kernels import linear_blocks

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


def test_stored_blocks_divide_their_weights():
    tables = linear_blocks.stored_blocks()
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
