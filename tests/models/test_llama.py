# SPDX-License-Identifier: Apache-2.0
"""LlamaForCausalLM against transformers, in float32: prefill, chunked prefill and decode steps of mixed sequences."""

from __future__ import annotations

import pytest
import torch
import transformers

from lightllm_backend.models.errors import ModelError
from lightllm_backend.parallel import TensorParallel
from tests.models.step_harness import (
    StepHarness,
    check_reads_nothing_back,
    check_steps,
    expected_logits,
    load_model,
    sequences,
)
from tests.models.thread_parallel import run_ranks

VOCAB = 96
LAYERS = 2
ORIGINAL_POSITIONS = 8
MAX_LENGTH = 24  # of the hand-made sequences
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def random_transformer(**changes) -> transformers.LlamaForCausalLM:
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 40,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": ORIGINAL_POSITIONS,
        "rope_theta": 100.0,
        **changes,
    }
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2, generator=generator)
    return model


def check(directory, **changes) -> None:
    transformer = random_transformer(**changes)
    transformer.save_pretrained(directory)
    check_steps(load_model(directory, MAX_LENGTH), transformer)


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (6, 2), (8, 1)])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128])
def test_logits_of_each_shape_of_attention(tmp_path, heads, kv_heads, head_dim):
    check(tmp_path, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 3.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 1.0},
        {"rope_type": "yarn", "factor": 4.0, "beta_fast": 1.5, "beta_slow": 0.1},
        {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.1] * 8, "long_factor": [1.5, 2.0, 3.0, 4.0] * 2},
        LLAMA3,
    ],
)
def test_logits_of_each_rope_scaling_beyond_the_original_length(tmp_path, scaling):
    check(tmp_path, rope_scaling=scaling)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("attention_bias", "mlp_bias"), [(True, False), (False, True)])
def test_logits_with_biases_and_with_a_tied_head(tmp_path, attention_bias, mlp_bias, tied):
    check(tmp_path, attention_bias=attention_bias, mlp_bias=mlp_bias, tie_word_embeddings=tied)


def test_logits_of_several_tokens_of_one_sequence(tmp_path):
    transformer = random_transformer()
    transformer.save_pretrained(tmp_path)
    sequence = sequences(VOCAB)[1]
    harness = StepHarness(load_model(tmp_path), LAYERS, rows=1, max_length=MAX_LENGTH)
    step = harness.step_input([(sequence, 11)])
    wanted = torch.tensor([2, 0, 10])
    logits = harness.model.forward(type(step)(**{**vars(step), "last_tokens": wanted}))
    torch.testing.assert_close(logits, expected_logits(transformer, sequence, 11)[wanted], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_ranks_together_compute_the_same_logits(tmp_path, size, tied):
    transformer = random_transformer(
        num_attention_heads=8, head_dim=16, attention_bias=True, mlp_bias=True, tie_word_embeddings=tied
    )
    transformer.save_pretrained(tmp_path)

    def run(parallel: TensorParallel) -> None:
        model = load_model(tmp_path, MAX_LENGTH, parallel)
        assert model.num_kv_heads == 1
        check_steps(model, transformer)

    run_ranks(size, run)


@pytest.mark.parametrize(
    ("size", "changes", "key"),
    [
        (3, {}, "num_attention_heads is 4"),
        (2, {"num_attention_heads": 6, "num_key_value_heads": 3}, "num_key_value_heads is 3"),
        (4, {"intermediate_size": 42}, "intermediate_size is 42"),
    ],
)
def test_a_number_of_ranks_that_does_not_divide_the_model_is_refused(tmp_path, size, changes, key):
    random_transformer(**changes).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=key):
        load_model(tmp_path, parallel=TensorParallel(0, size))


LONGROPE = {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


@pytest.mark.parametrize("scaling", [None, {"rope_type": "dynamic", "factor": 2.0}, LONGROPE])
def test_a_step_never_asks_the_device_for_a_value(tmp_path, scaling):
    random_transformer(rope_scaling=scaling).save_pretrained(tmp_path)
    check_reads_nothing_back(tmp_path)
