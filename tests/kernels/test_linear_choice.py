# SPDX-License-Identifier: Apache-2.0
"""Which kernel computes a product, and how it is cut."""

import sys
from types import SimpleNamespace

import pytest
import torch

from lightllm_backend.kernels.linear import choice, gated_linear, linear_splits
from lightllm_backend.kernels.linear.choice import Choice, Gpu, LinearBlocks, ProductKernel, choice_for, choose_kernel

AMPERE, HOPPER = Gpu((8, 0), 108), Gpu((9, 0), 132, has_descriptors=True, has_gluon=True)
WITHOUT_GLUON = HOPPER._replace(has_gluon=False)
CUBLAS, UNFUSED, SPLITS, TILES, PREFETCH, GATED_TILES = (
    ProductKernel.CUBLAS,
    ProductKernel.UNFUSED,
    ProductKernel.SPLITS,
    ProductKernel.TILES,
    ProductKernel.PREFETCH,
    ProductKernel.GATED_TILES,
)
PRODUCTS = [(12288, 4096, False), (64, 128, False), (576, 1536, False), (2048, 2048, False), (1024, 640, True)]
DOWN, GATED = (4096, 11008, False), (22016, 4096, True)


@pytest.mark.parametrize("product", [*PRODUCTS, DOWN, GATED])
@pytest.mark.parametrize("gpu", [AMPERE, Gpu((8, 9), 132), WITHOUT_GLUON])
@pytest.mark.parametrize("tokens", [1, 16, 17, 64])
def test_blocks_divide_the_weight(tokens, product, gpu):
    blocks = choose_kernel(tokens, *product, False, gpu).blocks
    if blocks is not None:
        assert product[0] % blocks.out == 0
        assert product[1] % (blocks.inner * blocks.splits) == 0
        assert blocks.splits == 1 or not product[2]


@pytest.mark.parametrize(
    ("tokens", "product", "gpu", "kernel"),
    [
        (1, DOWN, HOPPER, PREFETCH),
        (40, DOWN, HOPPER, PREFETCH),
        (40, DOWN, WITHOUT_GLUON, SPLITS),
        (40, DOWN, AMPERE, SPLITS),
        (40, DOWN, Gpu((7, 5), 72), CUBLAS),
        (65, DOWN, HOPPER, PREFETCH),
        (65, DOWN, WITHOUT_GLUON, TILES),
        (65, DOWN, WITHOUT_GLUON._replace(has_descriptors=False), CUBLAS),
        (65, DOWN, AMPERE, CUBLAS),
        (129, DOWN, HOPPER, TILES),
        (257, DOWN, HOPPER, CUBLAS),
        (2048, DOWN, HOPPER, CUBLAS),
        (0, DOWN, HOPPER, CUBLAS),
        (40, GATED, HOPPER, PREFETCH),
        (40, GATED, WITHOUT_GLUON, SPLITS),
        (40, GATED, Gpu((10, 0), 148, has_descriptors=True, has_gluon=True), SPLITS),
        (65, GATED, HOPPER, TILES),
        (257, GATED, HOPPER, UNFUSED),
        (1025, GATED, HOPPER, GATED_TILES),
        (1025, GATED, AMPERE, UNFUSED),
        (1, (250880, 4096, False), HOPPER, SPLITS),  # other token counts are stored
        (65, (2048, 2048, False), HOPPER, CUBLAS),  # not stored
        (1, (1000, 1000, False), HOPPER, CUBLAS),  # the rule's blocks do not divide it
    ],
)
def test_which_kernel_is_chosen(tokens, product, gpu, kernel):
    assert choose_kernel(tokens, *product, False, gpu).kernel is kernel


def test_a_bias_leaves_many_gated_tokens_to_cublas():
    assert choose_kernel(1025, *GATED, True, HOPPER).kernel is UNFUSED
    assert choose_kernel(40, *GATED, True, HOPPER).kernel is PREFETCH


def test_how_many_splits():
    assert choose_kernel(1, 2048, 2048, False, False, HOPPER).blocks.splits == 4  # not stored: the rule
    assert choose_kernel(1, 12288, 4096, False, False, HOPPER).blocks.splits == 1
    assert choose_kernel(65, *DOWN, False, WITHOUT_GLUON).blocks.splits == 2


def test_what_is_asked_of_tensors_and_the_gpu(monkeypatch):
    monkeypatch.setattr(choice, "compute_capability", lambda device: (9, 0))
    monkeypatch.setattr(choice, "multiprocessor_count", lambda device: 132)
    x, weight = torch.empty(33, 4096, dtype=torch.float16), torch.empty(22016, 4096, dtype=torch.float16)
    for tried, described in ((True, True), (True, False), (False, True)):
        monkeypatch.setattr(choice, "GLUON_TRIED", tried)
        monkeypatch.setattr(choice, "has_descriptors", lambda *tensors, described=described: described)
        chosen = choice_for(x, weight, is_gated=True).kernel
        assert chosen is (PREFETCH if tried and described else SPLITS)
    assert choice_for(x.float(), weight.float(), is_gated=True).kernel is UNFUSED
    assert choice_for(x.float(), weight.float()).kernel is CUBLAS


@pytest.mark.parametrize("is_gated", [False, True])
def test_others_launch_linear_prefetch(is_gated, monkeypatch):
    launched = []
    module = SimpleNamespace(launch_prefetch=lambda *arguments, **keywords: launched.append((arguments, keywords)))
    monkeypatch.setitem(sys.modules, "lightllm_backend.kernels.linear.linear_prefetch", module)
    x, weight, blocks = torch.empty(8, 64), torch.empty(64, 64), LinearBlocks(64, 64, 3, 4, 1, 2)
    launch = gated_linear.launch_gated if is_gated else linear_splits.launch_product
    out = torch.empty(8, 32) if is_gated else torch.empty(1, 8, 64)
    launch(x, weight, None, out, Choice(PREFETCH, blocks))
    (((got_x, got_weight, bias, parts, cut), keywords),) = launched
    assert (got_x is x, got_weight is weight, bias, cut) == (True, True, None, blocks)
    assert keywords == ({"is_gated": True, "is_gelu": False} if is_gated else {"is_gated": False})
    assert parts.shape == (1, 8, 32 if is_gated else 64)
    assert parts.data_ptr() == out.data_ptr()


@pytest.mark.parametrize("path", [choice.BLOCKS, choice.PREFETCH_BLOCKS])
def test_stored_blocks_divide_their_weights(path):
    tables = choice.stored_blocks(path)
    assert "9.0" in tables
    for table in tables.values():
        for name, by_tokens in table.items():
            out_features, in_features = (int(number) for number in name.removesuffix(", gated").split(" x "))
            assert name == choice.product_name(out_features, in_features, name.endswith("gated"))
            assert set(by_tokens) <= {str(count) for count in choice.FEW_TOKENS + choice.MORE_TOKENS}
            for tokens, stored in by_tokens.items():
                assert stored is not None or path == choice.BLOCKS
                blocks = None if stored is None else LinearBlocks(*stored)
                assert blocks is None or out_features % blocks.out == 0
                assert blocks is None or in_features % (blocks.inner * blocks.splits) == 0 or int(tokens) > 64
                assert blocks is None or blocks.splits == 1 or not name.endswith("gated")
                assert blocks is None or (blocks.programs_per_sm > 0) == (path == choice.PREFETCH_BLOCKS)
