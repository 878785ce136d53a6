# SPDX-License-Identifier: Apache-2.0
"""Steps by hand: sequences with scattered slots in a little KV pool, and the StepInput of any mix of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from types import ModuleType

import torch
import transformers
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from lightllm_backend.kernels import reference
from lightllm_backend.kv_pool.storage import KVStorage
from lightllm_backend.models.causal_lm import CausalLM, model_class
from lightllm_backend.models.layers import GroupInput, KVLayer, StepInput
from lightllm_backend.models.model_config import ModelConfig
from lightllm_backend.models.weights import load_weights
from lightllm_backend.parallel import TensorParallel

CPU = torch.device("cpu")


def load_model(directory, max_length=64, parallel=None, dtype=torch.float32) -> CausalLM:
    return model_of(directory, ModelConfig.from_directory(directory), parallel, dtype, max_length)


def model_of(directory, config, parallel=None, dtype=torch.float32, max_length=64, kernels=reference) -> CausalLM:
    """The model of a configuration that may differ from the directory's."""
    parallel = parallel or TensorParallel()
    model = model_class(config.architecture)(config, kernels, parallel, dtype, CPU, max_length)
    load_weights(model, directory, progress=False)
    return model


@dataclass
class HandSequence:
    """All tokens it will ever have are known beforehand; `cached` of them have their K and V in the pool."""

    row: int
    token_ids: list[int]
    prompt_length: int
    cached: int = 0

    @property
    def decodes(self) -> bool:
        return self.cached >= self.prompt_length


class StepHarness:
    """Owns the pool of one model, and gives each position of each row a slot of its own, in random order."""

    def __init__(self, model: CausalLM, num_layers: int, rows: int, max_length: int, kv_dtype=torch.float32) -> None:
        slots = rows * max_length
        generator = torch.Generator().manual_seed(1)
        self.model = model
        self.req_to_token = torch.randperm(slots, generator=generator).view(rows, max_length).to(torch.int32)
        storage = KVStorage(num_layers, slots, model.num_kv_heads, model.head_dim, kv_dtype, CPU)
        self.kv_layers = [KVLayer(*layer) for layer in storage.layers]
        for tensor in (tensor for layer in self.kv_layers for tensor in layer[:3] if tensor is not None):
            # What nobody has written must not be read.
            tensor.fill_(torch.nan if tensor.is_floating_point() else 127)

    def step(self, work: Sequence[tuple[HandSequence, int]]) -> Tensor:
        """Run the given number of new tokens of each sequence; the logits of each one's last token."""
        step = self.step_input(work)
        logits = self.model.forward(step)
        for sequence, count in work:
            sequence.cached += count
        return logits

    def step_input(self, work: Sequence[tuple[HandSequence, int]]) -> StepInput:
        decoding = [sequence.decodes for sequence, _ in work]
        assert decoding == sorted(decoding, reverse=True), "decode tokens come first"
        ids, positions, lengths, slots, starts = [], [], [], [], [sum(decoding)]
        for sequence, count in work:
            for position in range(sequence.cached, sequence.cached + count):
                ids.append(sequence.token_ids[position])
                positions.append(position)
                lengths.append(max(sequence.prompt_length, position + 1))
                slots.append(int(self.req_to_token[sequence.row, position]))
            if not sequence.decodes:
                starts.append(starts[-1] + count)
        counts = torch.tensor([count for _, count in work])
        contexts = [sequence.cached + count for sequence, count in work]
        return StepInput(
            input_ids=_int32(ids),
            positions=_int32(positions),
            rotary_lengths=_int32(lengths),
            rows=_int32([sequence.row for sequence, _ in work]),
            context_lengths=_int32(contexts),
            query_starts=_int32(starts),
            num_decodes=sum(decoding),
            max_context_length=max(contexts),
            last_tokens=counts.cumsum(0) - 1,
            groups=[GroupInput(_int32(slots), self.req_to_token)],
            kv_layers=self.kv_layers,
        )


def sequences(vocab_size: int) -> list[HandSequence]:
    """Three of 24 tokens, in rows 2, 0 and 1, with prompts of 5, 11 and 1."""
    generator = torch.Generator().manual_seed(4)
    drawn = torch.randint(vocab_size, (3, 24), generator=generator).tolist()
    return [HandSequence(row, drawn[row], prompt) for row, prompt in ((2, 5), (0, 11), (1, 1))]


def expected_logits(transformer: transformers.PreTrainedModel, sequence: HandSequence, total: int) -> Tensor:
    """Of each position of the first `total` tokens: the prompt at once, then one token after the other."""
    if isinstance(transformer, transformers.LlamaForCausalLM):
        # Made anew, for transformers' dynamic scaling remembers the longest sequence that it has seen.
        transformer.model.rotary_emb = LlamaRotaryEmbedding(transformer.config)
    cache = transformers.DynamicCache(config=transformer.config)
    tokens = torch.tensor([sequence.token_ids])
    pieces = [tokens[:, : sequence.prompt_length]]
    pieces += [tokens[:, position : position + 1] for position in range(sequence.prompt_length, total)]
    with torch.no_grad():
        return torch.cat([transformer(piece, past_key_values=cache).logits[0] for piece in pieces])


TOTALS = [12, 16, 6]  # tokens of each of `sequences` that check_steps computes
_one_at_a_time = Lock()


@lru_cache(maxsize=32)
def _expected_steps(transformer: transformers.PreTrainedModel) -> list[Tensor]:
    pairs = zip(sequences(transformer.config.vocab_size), TOTALS, strict=True)
    return [expected_logits(transformer, one, total) for one, total in pairs]


def check_steps(
    model: CausalLM, transformer: transformers.PreTrainedModel, kv_dtype=torch.float32, tolerance: float = 1e-4
) -> None:
    """Prefill, chunked prefill and decode steps of mixed sequences give the logits of transformers.

    Those are computed once for a transformer, which must not change afterwards. Ranks that are threads may share it.
    """
    vocab_size, num_layers = transformer.config.vocab_size, transformer.config.num_hidden_layers
    short, long, single = sequences(vocab_size)
    with _one_at_a_time:
        logits_of = _expected_steps(transformer)
    expected = {one.row: logits for one, logits in zip((short, long, single), logits_of, strict=True)}
    harness = StepHarness(model, num_layers, rows=3, max_length=24, kv_dtype=kv_dtype)
    steps = [
        [(short, 5), (long, 4)],
        [(long, 3)],
        [(short, 1), (long, 4), (single, 1)],
        *[[(single, 1), (short, 1), (long, 1)]] * 5,
    ]
    for work in steps:
        logits = harness.step(work)
        assert logits.shape == (len(work), vocab_size)
        assert logits.dtype == torch.float32
        for row, (sequence, _) in zip(logits, work, strict=True):
            torch.testing.assert_close(row, expected[sequence.row][sequence.cached - 1], atol=tolerance, rtol=tolerance)


def check_reads_nothing_back(directory) -> None:
    """A forward pass on the meta device: its tensors have no values, so reading one, or a shape by one, raises."""
    meta = torch.device("meta")
    config = ModelConfig.from_directory(directory)
    model = model_class(config.architecture)(config, _shape_kernels(), TensorParallel(), torch.float16, meta, 24)
    short, long, _ = sequences(config.vocab_size)
    short.cached = short.prompt_length
    harness = StepHarness(model, config.num_layers, rows=3, max_length=24)
    step = harness.step_input([(short, 1), (long, 4)])
    on_meta = {name: value.to(meta) if isinstance(value, Tensor) else value for name, value in vars(step).items()}
    logits = model.forward(type(step)(**on_meta))
    assert (logits.shape, logits.dtype, logits.device) == ((2, config.vocab_size), torch.float16, meta)


def _shape_kernels() -> ModuleType:
    """Kernels that only make tensors of the right shape, on whatever device."""
    kernels = ModuleType("shape_kernels")
    kernels.rms_norm = lambda x, *arguments, **more: x.new_empty(x.shape[-2:])
    kernels.layer_norm = kernels.rms_norm
    kernels.rotary_kv_write = lambda *arguments, **scales: None
    kernels.token_attention = lambda q, *arguments, **more: q.contiguous()
    kernels.prefill_attention = kernels.token_attention
    kernels.linear = lambda x, weight, bias=None, out=None, is_gelu=False: x.new_empty(x.shape[0], weight.shape[0])
    kernels.linear_splits = lambda x, weight, bias=None: x.new_empty(1, x.shape[0], weight.shape[0])
    kernels.gated_linear = lambda x, weight, *arguments: x.new_empty(len(x), weight.shape[0] // 2)
    return kernels


def _int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)
