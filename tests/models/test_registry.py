# SPDX-License-Identifier: Apache-2.0
"""The registry's names and classes."""

from __future__ import annotations

import pytest

from lightllm_backend.models.causal_lm import model_class
from lightllm_backend.models.errors import ModelError
from lightllm_backend.models.registry import ARCHITECTURES


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_architecture_has_its_class(architecture):
    assert model_class(architecture).__name__ == architecture


def test_an_unknown_architecture_names_those_known():
    with pytest.raises(ModelError, match=r"'OPTForCausalLM' is not known; known: .*LlamaForCausalLM"):
        model_class("OPTForCausalLM")
