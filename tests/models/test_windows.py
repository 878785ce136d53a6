# SPDX-License-Identifier: Apache-2.0
"""What a model says of its windows, by which K and V are given back, is what its attention sees."""

from pathlib import Path

import pytest

from tests.models.random_models import FAMILIES, save_random_model
from tests.models.step_harness import load_model


@pytest.mark.parametrize("family", list(FAMILIES))
def test_windows_are_those_of_attention(family: str, tmp_path: Path) -> None:
    model = load_model(save_random_model(family, tmp_path))
    seen = []
    for layer in model.layers:
        attention = layer.attention
        while not hasattr(attention, "attend"):
            attention = attention.part
        seen.append(attention.attend.window)
    assert model.windows == seen
