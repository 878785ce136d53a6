# SPDX-License-Identifier: Apache-2.0
"""LlamaForCausalLM against transformers, in float32: prefill, chunked prefill and decode steps of mixed sequences."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import ModuleType

import pytest
import torch
import transformers
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from lightllm_backend.models.errors import ModelError
from lightllm_backend.models.llama import LlamaForCausalLM
from lightllm_backend.models.model_config import ModelConfig
from lightllm_backend.parallel import TensorParallel
from tests.models.step_harness import HandSequence, StepHarness, load_model

VOCAB = 96
LAYERS = 2
ORIGINAL_POSITIONS = 8
MAX_LENGTH = 24
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


def sequences() -> list[HandSequence]:
    generator = torch.Generator().manual_seed(4)
    drawn = torch.randint(VOCAB, (3, MAX_LENGTH), generator=generator).tolist()
    return [HandSequence(row, drawn[row], prompt) for row, prompt in ((2, 5), (0, 11), (1, 1))]


def expected_logits(transformer: transformers.LlamaForCausalLM, sequence: HandSequence, total: int) -> Tensor:
    """Of each position of the first `total` tokens: the prompt at once, then one token after the other."""
    # Made anew, for transformers' dynamic scaling remembers the longest sequence that it has seen.
    transformer.model.rotary_emb = LlamaRotaryEmbedding(transformer.config)
    cache = transformers.DynamicCache()
    tokens = torch.tensor([sequence.tokens])
    pieces = [tokens[:, : sequence.prompt_length]]
    pieces += [tokens[:, position : position + 1] for position in range(sequence.prompt_length, total)]
    with torch.no_grad():
        return torch.cat([transformer(piece, past_key_values=cache).logits[0] for piece in pieces])


def check_steps(model: LlamaForCausalLM, transformer: transformers.LlamaForCausalLM) -> None:
    short, long, single = sequences()
    totals = {short.row: 12, long.row: 16, single.row: 6}
    expected = {sequence.row: expected_logits(transformer, sequence, totals[sequence.row]) for sequence in sequences()}
    harness = StepHarness(model, LAYERS, rows=3, max_length=MAX_LENGTH)
    steps = [
        [(short, 5), (long, 4)],
        [(long, 3)],
        [(short, 1), (long, 4), (single, 1)],
        *[[(single, 1), (short, 1), (long, 1)]] * 5,
    ]
    for work in steps:
        logits = harness.step(work)
        assert logits.shape == (len(work), VOCAB)
        assert logits.dtype == torch.float32
        for row, (sequence, _) in zip(logits, work, strict=True):
            torch.testing.assert_close(row, expected[sequence.row][sequence.cached - 1], atol=1e-4, rtol=1e-4)


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
    sequence = sequences()[1]
    harness = StepHarness(load_model(tmp_path), LAYERS, rows=1, max_length=MAX_LENGTH)
    step = harness.step_input([(sequence, 11)])
    wanted = torch.tensor([2, 0, 10])
    logits = harness.model.forward(type(step)(**{**vars(step), "last_tokens": wanted}))
    torch.testing.assert_close(logits, expected_logits(transformer, sequence, 11)[wanted], atol=1e-4, rtol=1e-4)


@dataclass(frozen=True)
class ThreadParallel(TensorParallel):
    """Ranks that are threads of this process and exchange their tensors through a list."""

    barrier: threading.Barrier = field(default_factory=lambda: threading.Barrier(1))
    shared: list[Tensor | None] = field(default_factory=list)

    def all_reduce(self, x: Tensor) -> Tensor:
        return torch.stack(self._exchange(x)).sum(0)

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.cat(self._exchange(x), dim=-1)

    def _exchange(self, x: Tensor) -> list[Tensor]:
        self.shared[self.rank] = x.clone()
        self.barrier.wait(timeout=30)
        everyone = list(self.shared)
        self.barrier.wait(timeout=30)
        return everyone


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_ranks_together_compute_the_same_logits(tmp_path, size, tied):
    transformer = random_transformer(
        num_attention_heads=8, head_dim=16, attention_bias=True, mlp_bias=True, tie_word_embeddings=tied
    )
    transformer.save_pretrained(tmp_path)
    barrier, shared = threading.Barrier(size), [None] * size

    def run(rank: int) -> None:
        try:
            model = load_model(tmp_path, MAX_LENGTH, ThreadParallel(rank, size, barrier, shared))
            assert model.num_kv_heads == 1
            check_steps(model, random_transformer_like(transformer))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        list(pool.map(run, range(size)))


def random_transformer_like(transformer: transformers.LlamaForCausalLM) -> transformers.LlamaForCausalLM:
    """A copy for one thread: the rotary embedding has a state of its own."""
    copy = transformers.LlamaForCausalLM(transformer.config).eval()
    copy.load_state_dict(transformer.state_dict())
    return copy


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


def shape_kernels() -> ModuleType:
    """Kernels that only make tensors of the right shape, on whatever device."""
    kernels = ModuleType("shape_kernels")
    kernels.rms_norm = lambda x, weight, eps, residual=None: torch.empty_like(x)
    kernels.rotary_kv_write = lambda *arguments: None
    kernels.token_attention = lambda q, *arguments: q.contiguous()
    kernels.prefill_attention = kernels.token_attention
    kernels.silu_and_mul = lambda gate_up: gate_up[:, : gate_up.shape[1] // 2].contiguous()
    return kernels


@pytest.mark.parametrize("scaling", [None, {"rope_type": "dynamic", "factor": 2.0}])
def test_a_step_never_asks_the_device_for_a_value(tmp_path, scaling):
    # Tensors of the meta device have no values: reading one, or a shape that depends on one, raises.
    random_transformer(rope_scaling=scaling).save_pretrained(tmp_path)
    meta = torch.device("meta")
    config = ModelConfig.from_directory(tmp_path)
    model = LlamaForCausalLM(config, shape_kernels(), TensorParallel(), torch.float16, meta, MAX_LENGTH)
    short, long, _ = sequences()
    short.cached = short.prompt_length
    harness = StepHarness(model, LAYERS, rows=3, max_length=MAX_LENGTH)
    step = harness.step_input([(short, 1), (long, 4)])
    on_meta = {name: value.to(meta) if isinstance(value, Tensor) else value for name, value in vars(step).items()}
    logits = model.forward(type(step)(**on_meta))
    assert (logits.shape, logits.dtype, logits.device) == ((2, VOCAB), torch.float32, meta)
