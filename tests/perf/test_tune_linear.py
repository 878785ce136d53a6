# SPDX-License-Identifier: Apache-2.0
"""What perf.tune_linear prints of the rule for weights without stored blocks."""

import pytest

from lightllm_backend.kernels.linear.choice import Gpu, LinearBlocks
from perf import tune_linear
from perf.tune_linear import Product, rule_against_others

H200 = Gpu((9, 0), 132)


def test_the_rule_is_compared_with_the_quickest_of_each_number_of_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    def block_times(product: Product, tokens: int, tried: list[LinearBlocks]) -> dict[LinearBlocks | None, float]:
        assert all(product.in_features % (blocks.splits * blocks.inner) == 0 for blocks in tried)
        return {blocks: (10 * blocks.splits + blocks.num_stages) / 1e6 for blocks in tried}

    monkeypatch.setattr(tune_linear, "block_times", block_times)
    assert rule_against_others(Product(4096, 512, False, True), 16, H200) == (
        " 0.48 programs a multiprocessor, 4096 x 512, 16 tokens: rule 2 x 5 stages 25.00, 92.3 % over the quickest of"
        " 1 x 3 stages 13.00, 2 x 3 stages 23.00, 4 x 3 stages 43.00"
    )
    assert "over the quickest of 1 x 3 stages 13.00" in rule_against_others(Product(8192, 512, True, False), 16, H200)
    assert rule_against_others(Product(4000, 512, False, True), 16, H200).endswith("the rule has no blocks")
