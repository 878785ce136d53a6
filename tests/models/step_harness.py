# SPDX-License-Identifier: Apache-2.0
"""Steps by hand: sequences with scattered slots in a little KV pool, and the StepInput of any mix of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightllm_backend.kernels import reference
from lightllm_backend.models.layers import CausalLM, StepInput
from lightllm_backend.models.llama import LlamaForCausalLM
from lightllm_backend.models.model_config import ModelConfig
from lightllm_backend.models.weights import load_weights
from lightllm_backend.parallel import TensorParallel

CPU = torch.device("cpu")


def load_model(directory, max_length=64, parallel=None, dtype=torch.float32) -> LlamaForCausalLM:
    parallel = parallel or TensorParallel()
    config = ModelConfig.from_directory(directory)
    model = LlamaForCausalLM(config, reference, parallel, dtype, CPU, max_length)
    load_weights(model, directory, progress=False)
    return model


@dataclass
class HandSequence:
    """All tokens it will ever have are known beforehand; `cached` of them have their K and V in the pool."""

    row: int
    tokens: list[int]
    prompt_length: int
    cached: int = 0

    @property
    def decodes(self) -> bool:
        return self.cached >= self.prompt_length


class StepHarness:
    """Owns the pool of one model, and gives each position of each row a slot of its own, in random order."""

    def __init__(self, model: CausalLM, num_layers: int, rows: int, max_length: int, dtype=torch.float32) -> None:
        slots = rows * max_length
        generator = torch.Generator().manual_seed(1)
        self.model = model
        self.req_to_token = torch.randperm(slots, generator=generator).view(rows, max_length).to(torch.int32)
        # What nobody has written must not be read.
        shape = (slots, model.num_kv_heads, model.head_dim)
        self.kv_layers = [
            (torch.full(shape, torch.nan, dtype=dtype), torch.full(shape, torch.nan, dtype=dtype))
            for _ in range(num_layers)
        ]

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
        ids, positions, lengths, slots, starts = [], [], [], [], [0]
        for sequence, count in work:
            for position in range(sequence.cached, sequence.cached + count):
                ids.append(sequence.tokens[position])
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
            slots=_int32(slots),
            rows=_int32([sequence.row for sequence, _ in work]),
            context_lengths=_int32(contexts),
            query_starts=_int32(starts),
            num_decodes=sum(decoding),
            max_query_length=max(count for _, count in work),
            max_context_length=max(contexts),
            last_tokens=counts.cumsum(0) - 1,
            req_to_token=self.req_to_token,
            kv_layers=self.kv_layers,
        )


def _int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)
